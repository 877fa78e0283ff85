from __future__ import annotations

from pathlib import Path

import pytest

from mmrec.adaptation import Catalogue, CatalogueError, TextTemplate, item_texts, mask_title


def test_the_default_text(shop: Path) -> None:
    texts, mask = item_texts(Catalogue.load(shop))
    assert mask.all() and texts == [
        "Mug, large\nA mug\nbrand: Alder",
        "Black tea\nbrand: Birch\norganic: false\ntags: tea\nprice: 3",
        "Green tea\nFresh leaves from the hills\nbrand: Alder\norganic: true\ntags: tea, green\nprice: 4.5",
    ]


def test_columns_labels_units_and_missing_values(shop: Path) -> None:
    (shop / "catalogue.json").write_text(
        '{"items": {"title": "title", "text": ["title"], "numeric": ["price"], "multi": ["tags"], '
        '"units": {"price": "EUR"}}}'
    )
    catalogue = Catalogue.load(shop)
    template = TextTemplate(
        columns=("price", "tags", "title"), labels={"price": "costs"}, missing="unknown", separator="; ", max_values=1
    )
    texts, mask = item_texts(catalogue, template=template)
    assert texts == [
        "costs: unknown; tags: unknown; Mug, large",
        "costs: 3 EUR; tags: tea; Black tea",
        "costs: 4.5 EUR; tags: tea; Green tea",
    ]
    table, known = item_texts(catalogue, template=TextTemplate(columns=("price", "tags"), missing="unknown"))
    assert known.tolist() == [False, True, True], "words for missing values do not make an item known"
    assert table[0] == ""


def test_presets(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    assert item_texts(catalogue, template="title")[0] == ["Mug, large", "Black tea", "Green tea"]
    assert item_texts(catalogue, template="text")[0][0] == "Mug, large\nA mug"
    assert item_texts(catalogue, template="table")[0][0] == "brand: Alder"
    masked = item_texts(catalogue, template="masked")[0]
    assert masked[1] == "brand: Birch\norganic: false\ntags: tea\nprice: 3"


def test_free_text_gives_way_to_facts(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    full = item_texts(catalogue)[0][2]
    for limit in range(1, len(full) + 2):
        text = item_texts(catalogue, max_chars=limit)[0][2]
        assert len(text) <= limit
        if limit >= len(full) - len("Fresh leaves from the hills"):
            assert text.endswith("brand: Alder\norganic: true\ntags: tea, green\nprice: 4.5")
    assert item_texts(catalogue, max_chars=len(full))[0][2] == full
    assert item_texts(catalogue, max_chars=len(full) - 3)[0][2].startswith("Green tea\nFresh leaves from the\nbrand")


@pytest.mark.parametrize(
    ("number", "written"), [(12.0, "12"), (0.125, "0.125"), (373554033.0, "373554033"), (-2.5, "-2.5"), (1e-7, "1e-07")]
)
def test_numbers(number: float, written: str, shop: Path) -> None:
    (shop / "items.csv").write_text(f"item_id,size\n10,{number!r}\n9,\n2,\n")
    texts, mask = item_texts(Catalogue.load(shop))
    assert texts[2] == f"size: {written}" and mask.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("text", "title", "masked"),
    [
        ("The Mask stars a mask.", "Mask, The (1994)", "[title] stars a mask."),
        ("See GoldenEye (1995) and Goldeneye, GOLDENEYE.", "GoldenEye (1995)", "See [title] and Goldeneye, [title]."),
        ("pulp fiction is Pulp Fiction", "Pulp Fiction (1994)", "[title] is [title]"),
        ("Bigger than Big, so big", "Big (1988)", "Bigger than [title], so big"),
        ("Star Wars and Star Wars: Episode IV", "Star Wars: Episode IV (1977)", "[title] and [title]"),
        ("C++ (again) and C++", "C++ (again)", "[title] and C++"),
        ("Nothing here", "Absent", "Nothing here"),
        (r"a \1 b", "Slash", r"a \1 b"),
    ],
)
def test_mask_title(text: str, title: str, masked: str) -> None:
    assert mask_title(text, title) == masked


def test_the_replacement_is_literal() -> None:
    assert mask_title("Alien", "Alien", r"\g<0>") == r"\g<0>"


def test_keys_tell_templates_apart() -> None:
    keys = {t.key() for t in (TextTemplate(), TextTemplate(mask_title=True), TextTemplate(columns=("a",)))}
    assert len(keys) == 3 and TextTemplate().key() == TextTemplate().key()


def test_bad_templates_are_refused(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    with pytest.raises(CatalogueError, match="template 'long' is unknown; give a TextTemplate or one of full, title"):
        item_texts(catalogue, template="long")
    with pytest.raises(CatalogueError, match="column 'weight' cannot be written as text"):
        item_texts(catalogue, template=TextTemplate(columns=("weight",)))
    with pytest.raises(CatalogueError, match="max_chars needs a positive number"):
        item_texts(catalogue, max_chars=0)
