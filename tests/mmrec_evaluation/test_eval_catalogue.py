"""The package's own readers lead to the same splits as the raw files."""

import pytest

pytest.importorskip("polars")

from mmrec.adaptation.catalogue import Catalogue  # noqa: E402
from mmrec.evaluation.protocols import split  # noqa: E402


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "protocol", "expected"),
    [
        ("amazon-scientific", "S", "scientific"),
        ("amazon-beauty", "S", "beauty"),
        ("movielens-100k-mm", "S", "movielens"),
        ("amazon-baby", "G", "baby"),
    ],
)
def test_a_loaded_catalogue_splits_as_the_raw_files(folder, protocol, expected, real_data, request):
    found, raw = split(Catalogue.load(real_data(folder)), protocol), request.getfixturevalue(expected)
    assert (found.num_users, found.num_items) == (raw.num_users, raw.num_items)
    assert found.id == raw.id


@pytest.mark.data
def test_global_time_on_movielens(real_data):
    parts = split(Catalogue.load(real_data("movielens-100k-mm")), "T")
    sizes = [len(part.ids) for part in (parts.train, parts.valid, parts.test)]
    assert sum(sizes) == 100_000
    # Timestamps tie, so the cuts are not exact; nobody's later interactions train.
    assert sizes == pytest.approx([80_000, 10_000, 10_000], abs=300)
    assert 0 < len(parts.users("test")) < (parts.test.lengths > 0).sum()


@pytest.mark.data
def test_the_general_rule_fits_the_stored_split(real_data):
    catalogue = Catalogue.load(real_data("amazon-baby"))
    stored = split(catalogue, "G")
    # Drawn by our seed instead: other items, the same number per user.
    events = catalogue.interactions
    from mmrec.evaluation.protocols import general

    drawn = general(events.user, events.item, stored.num_users, stored.num_items, seed=0)
    for part in ("train", "valid", "test"):
        assert (getattr(stored, part).lengths == getattr(drawn, part).lengths).all()
    assert stored.id != drawn.id and stored.dropped_users == 0
