import pytest

from raypipe.run import training
from tests.run.labelled import Trained, make_labelled, settings
from tests.run.test_pipeline import quiet


@pytest.fixture(scope="session")
def trained(session, tmp_path_factory) -> Trained:
    """11 epochs of 45 photos, an odd number of rows, on 2 workers, judged on all of the photos. Never change it."""
    root = make_labelled(tmp_path_factory.mktemp("trained"))
    judged = {"holdout_input": root / "photos", "holdout_annotations": root / "boxes.json"}
    given = settings(root, workers=2, epochs=11, lr=5e-3, shard_rows=15, **judged)
    console = quiet()
    outcome = training.run(given, console=console)
    return Trained(root=root, settings=given, outcome=outcome, said=console.file.getvalue())
