"""The style sheet of all pages: report.html and sweep.html."""

CSS = """
:root{color-scheme:light dark;--bg:#fff;--panel:#f5f7f9;--ink:#1a1f26;--dim:#596471;--line:#d9dee4;
--bad:#b3261e;--good:#00704f;
--c0:#0067b0;--c1:#c8550c;--c2:#00866a;--c3:#a8488f;--c4:#806400;--c5:#4d545c;--starved:#dfe4ea;
--blocked:#8d97a3}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181d;--panel:#1d2329;--ink:#e7ebef;
--dim:#9aa6b2;--line:#343c45;
--bad:#ff8a80;--good:#4fd1a5;--c0:#58b0ee;--c1:#f0a03c;--c2:#35c99f;--c3:#e58fcb;--c4:#e3d35a;
--c5:#b8c0c8;
--starved:#3a434d;--blocked:#77838f}}
.s0{--c:var(--c0)}.s1{--c:var(--c1)}.s2{--c:var(--c2)}.s3{--c:var(--c3)}.s4{--c:var(--c4)}
.s5{--c:var(--c5)}
.none{--c:var(--dim)}.starved{--c:var(--starved)}.blocked{--c:var(--blocked)}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:2rem clamp(1rem,4vw,2.5rem) 4rem}
.run,.dim,.unit,dt{color:var(--dim)}.run{margin:0;font-size:.9rem}
h1{font-size:clamp(1.45rem,3.4vw,2.2rem);line-height:1.22;margin:.4rem 0 1rem;
letter-spacing:-.012em;text-wrap:balance}
h2{font-size:1.15rem;margin:2.8rem 0 .9rem;padding-bottom:.35rem;
border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:0;display:inline}
.lead{font-size:1.1rem;color:var(--dim);margin:0 0 1rem}
.gain{font-weight:600}td .gain{color:var(--good)}.bad{color:var(--bad)}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.34rem 1.4rem .34rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);font-weight:400}
td{overflow-wrap:anywhere;min-width:4.5rem}
thead th{color:var(--dim)}.key{white-space:nowrap}tbody th{color:var(--dim);position:sticky;left:0;
background:var(--bg)}h1~.scroll tbody th{color:inherit}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:.75rem;margin:0}
.tiles :first-child{grid-column:span 2}
.tiles div{background:var(--panel);border-radius:10px;padding:.8rem 1rem}
.tiles dt{font-size:.85rem}.tiles dd{margin:0;font-size:.82rem;color:var(--dim);line-height:1.35}
.tiles b{display:block;font-size:1.6rem;font-weight:650;line-height:1.3;color:var(--ink);
font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));
gap:1.8rem 2.4rem}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .6rem;font-size:.88rem}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-left:auto}
.key::before{content:"";display:inline-block;width:.75em;height:.75em;border-radius:2px;
margin-right:.4em;background:var(--c)}
.plot{display:block;overflow:visible;height:170px;width:calc(100% - 58px);
margin:10px 10px 42px 48px}
.plot text{font-size:12px;fill:var(--dim);font-variant-numeric:tabular-nums}
.plot .said{fill:var(--ink);paint-order:stroke;stroke:var(--bg);stroke-width:4px;
stroke-linejoin:round}
.in{overflow:visible}.grid{stroke:var(--line)}
path{fill:none;stroke:var(--c);vector-effect:non-scaling-stroke;stroke-width:2px;
stroke-linejoin:round;stroke-linecap:round}
path.steps{stroke-linecap:butt;stroke-linejoin:miter}path.area{fill:var(--c);stroke:none}
.tall{height:230px}.ideal{stroke-width:1.5px;stroke-dasharray:5 4;opacity:.75}
.key.ideal::before{height:0;width:1.1em;border-top:2px dashed var(--c);background:none;
vertical-align:.25em;border-radius:0}
.range{stroke:var(--c);stroke-width:1.5px;opacity:.55}.mark{fill:var(--c);stroke:var(--c);
stroke-width:2px}.hollow{fill:var(--bg)}
.event{stroke:var(--c);stroke-width:1.5px;stroke-dasharray:4 3}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.13}
.spent{display:flex;width:8rem;height:.8em;margin-top:.35em;border-radius:3px;overflow:hidden}
.spent i{background:var(--c)}
.bars{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.4rem 1rem;margin:0 0 1rem;
align-items:center}
.bars dd{margin:0;display:flex;align-items:center;gap:.6rem}.bars b{font-weight:600;
white-space:nowrap}
.bars i{flex:none;height:1.1em;min-width:2px;background:var(--c);border-radius:0 3px 3px 0}
.rows{list-style:none;margin:0;padding:0;display:grid;
grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.75rem}
.rows li{display:flex;gap:.9rem;background:var(--panel);border-radius:10px;padding:.75rem;
break-inside:avoid}
.rows img,.rows .no{flex:none;width:84px;height:84px;object-fit:contain;border-radius:6px;
background:var(--line)}
.rows .no{display:grid;place-content:center;font-size:.75rem;color:var(--dim);text-align:center}
.rows div{min-width:0;font-size:.85rem;line-height:1.4}.rows div>*{display:block;max-height:4.2em;
overflow-y:auto}.rows em{font-style:normal;color:var(--bad)}
.claims td:nth-child(3),.claims td:nth-child(4){min-width:15rem}
.pill{display:inline-block;white-space:nowrap;font-size:.82rem;font-weight:600;padding:.05rem .6rem;
border-radius:1rem;border:1px solid}
.pill.yes{color:var(--good)}.pill.no{color:var(--bad)}.pill.cannot{color:var(--dim)}
.shown{margin:0;min-width:0;break-inside:avoid}.shown>p{margin:0 0 .7rem;font-size:.88rem}
.shown .bars{margin-top:.6rem}
details{margin:.4rem 0}summary{cursor:pointer;padding:.3rem 0;font-weight:600}
@media (max-width:640px){th,td{padding-right:.8rem}.tiles b{font-size:1.3rem}
tbody th{min-width:8rem}.tiles{grid-template-columns:1fr 1fr}.bars{grid-template-columns:1fr;gap:0}
.bars dd{margin-bottom:.5rem}
.claims thead{display:none}.claims tr,.claims td{display:block;border:0;padding:0 0 .3rem}
.claims tbody th{display:inline;position:static;border:0;padding:0 .6rem 0 0}
.claims td:first-of-type{display:inline}.claims tr{border-bottom:1px solid var(--line);
padding:.7rem 0}}
@media print{main{max-width:none;padding:0}body{font-size:11pt}.hit{display:none}
.scroll{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;height:auto}}
"""
