"""A page read back with an HTML parser, and records of runs to make one of."""

from html.parser import HTMLParser

from raypipe.insight.html import page

HOSTILE = (
    "</script></style></title>--><img src=x onerror=alert(1)>\"' onload='alert(1)"
    "\n\r\t\0\u202egpj.exe\u2066\udc80&lt;&#x27;"
)
JPEG = b"\xff\xd8\xff\xe0 not much of a picture \xff\xd9"
VOID = {"meta", "img", "br"}


def bucket(t_s: float, stage: str, **figures) -> dict:
    known = {
        "actors": 2,
        "images_per_s": 100.0,
        "cpu_cores": 1.5,
        "rss_bytes": 400_000_000,
        "gpu_percent": 80.0,
    }
    return {
        "t_s": t_s,
        "stage": stage,
        **known,
        "busy": 0.5,
        "starved": 0.25,
        "blocked": 0.25,
        "queued": 1,
        **figures,
    }


def stage(name: str, **figures) -> dict:
    counts = {"start": 2, "min": 2, "max": 4, "end": 3}
    cost = {
        "images": 1000,
        "cpu_s_per_image": 0.00575,
        "busy_s_per_image": 0.01,
        "cpu_percent": 38.2,
        "rss_peak_bytes": 536_000_000,
        "private_peak_bytes": 336_000_000,
    }
    gpu = {
        "gpu_percent": 91.0,
        "gpu_memory_peak_bytes": 17_300_000_000,
        "bytes_in": 16_900_000,
        "bytes_out": 54_000_000,
    }
    return {
        "name": name,
        "actors": counts,
        **cost,
        **gpu,
        "busy": 0.77,
        "starved": 0.02,
        "blocked": 0.21,
        **figures,
    }


def report(**changes) -> dict:
    advice = [
        {"change": "preprocess actors 4 -> 5", "predicted_images_per_s": 250.0},
        {"change": "write actors 4 -> 5", "predicted_images_per_s": 200.0},
    ]
    return {
        "run_id": "20261124-085752-f6e3",
        "settings": {"input": "photos", "limit": None, "resume": True},
        "versions": {"ray": "2.60.0"},
        "hardware": {"cores": 16, "nodes": 2, "memory_bytes": 25_276_063_744},
        "images_in": 1000,
        "images_out": 990,
        "images_rejected": 10,
        "images_done_before": 100,
        "rejects_by_reason": {"truncated": 3, "not an image": 7},
        "setup_s": 3.0,
        "wall_s": 7.5,
        "first_output_s": 1.25,
        "images_per_s": 133.0,
        "steady_images_per_s": 200.0,
        "cpu_percent": 63.3,
        "stages": [stage("preprocess"), stage("write")],
        "verdict": {
            "stage": "preprocess",
            "reason": "preprocess limits: it is busy. More would help.",
            "advice": advice,
        },
        "predicted": {
            "images_per_s": 250.0,
            "measured_images_per_s": 200.0,
            "actors": {"preprocess": 4, "write": 3},
        },
        "scale_events": [{"t_s": 4.0, "stage": "write", "from": 2, "to": 3}],
        "timeline": [bucket(float(t), name) for t in range(8) for name in ("preprocess", "write")],
        **changes,
    }


def reject(**changes) -> dict:
    return {
        "image_id": "1",
        "uri": "photos/1.jpg",
        "reason": "truncated",
        "detail": "",
        "thumbnail": JPEG,
        **changes,
    }


class Element:
    def __init__(self, tag: str, attributes: dict[str, str]):
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    def all(self, tag: str | None = None, **attributes: str) -> list["Element"]:
        """Elements below, of this tag, whose attributes are or (class) contain these."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                has = all(
                    value in child.attributes.get(key.rstrip("_"), "").split(" ")
                    for key, value in attributes.items()
                )
                found += ([child] if has and tag in (None, child.tag) else []) + child.all(
                    tag, **attributes
                )
        return found

    @property
    def elements(self) -> list["Element"]:
        return [child for child in self.children if isinstance(child, Element)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Reader(HTMLParser):
    """Builds the tree and fails where an element is not closed in order."""

    def __init__(self, document: str):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(document)
        self.close()
        assert len(self.open) == 1, f"left open: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(*args, **kwargs) -> Element:
    return Reader(page(*args, **kwargs)).open[0]


def section(tree: Element, title: str) -> Element:
    return next(s for s in tree.all("section") if s.all("h2")[0].text == title)


def figure(tree: Element, title: str) -> Element:
    return next(f for f in tree.all("figure") if f.all("h3")[0].text == title)


def cells(tree: Element, title: str, row: str) -> list[str]:
    found = next(r for r in section(tree, title).all("tr") if r.all("th")[0].text == row)
    return [cell.text for cell in found.all("td")]


def filled(value, text: str):
    """`value` with `text` in place of every string, and of the keys that come from outside."""
    if isinstance(value, dict):
        outside = {"versions", "settings", "hardware", "rejects_by_reason"}
        return {
            key: {f"{text}{i}": filled(v, text) for i, v in enumerate(inner.values())}
            if key in outside
            else filled(inner, text)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [filled(item, text) for item in value]
    return text if isinstance(value, str) else value


def shape(tree: Element) -> list[tuple[str, list[str]]]:
    return [(element.tag, sorted(element.attributes)) for element in tree.all()]
