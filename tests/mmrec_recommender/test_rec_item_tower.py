from __future__ import annotations

import dataclasses

import pytest
import torch
from rec_helpers import ALL, BARE, COLD, CONTENT, ITEMS, KNOWN, NOTHING, TRAINED, config, inputs, model_of

from mmrec.recommender import ItemInputs, ItemOutput, ItemSpec, ItemTower, Recommender

EVERY = torch.arange(ITEMS)
FUSIONS = [
    {"fusion": when, "fusion_layers": layers} for when in ("early", "intermediate", "late") for layers in (0, 2)
]  # fmt: skip


def encode(model: Recommender, content: ItemInputs | None = None, items: torch.Tensor = EVERY) -> ItemOutput:
    return model.encode((content or inputs()).select(items), items)


def test_identity_alone_is_the_embedding_and_zero_for_a_cold_item() -> None:
    model = model_of(config("identity"))
    output = encode(model)
    assert model.item_tower.identity is not None
    assert torch.equal(output.vectors[KNOWN], model.item_tower.identity[KNOWN])
    assert not output.vectors[[COLD, NOTHING]].any()
    assert output.mass[:, 0].tolist() == TRAINED.astype(float).tolist()
    assert output.routing is None and output.pooled == {}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_mass_is_the_share_of_each_modality(fusion: dict[str, object]) -> None:
    content = inputs()
    output = encode(model_of(config(**fusion)), content)
    expected = torch.ones(ITEMS).double()
    expected[NOTHING] = 0
    torch.testing.assert_close(output.mass.sum(1), expected)
    present = {**content.present(), "identity": torch.from_numpy(TRAINED)}
    for m, name in enumerate(ALL):
        assert torch.equal(output.mass[:, m] > 0, present[name]), name
        assert torch.equal(output.present[name], present[name])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_item_with_nothing_but_its_identity(fusion: dict[str, object]) -> None:
    output = encode(model_of(config(**fusion)))
    torch.testing.assert_close(output.mass[BARE], torch.tensor([1.0, 0.0, 0.0, 0.0]).double())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_cold_items_identity_is_never_read(fusion: dict[str, object]) -> None:
    model = model_of(config(**fusion))
    before = encode(model)
    assert model.item_tower.identity is not None
    with torch.no_grad():
        model.item_tower.identity[[COLD, NOTHING]] += 3.0
        model.item_tower.identity[0] += 3.0
    after = encode(model)
    same = (before.vectors == after.vectors).all(1)
    assert same.tolist() == [item != 0 for item in range(ITEMS)]
    assert before.mass[COLD, 0] == 0 and before.vectors[COLD].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_cold_item_without_content_is_zero(fusion: dict[str, object]) -> None:
    assert not encode(model_of(config(**fusion))).vectors[NOTHING].any()


def test_without_identity_every_item_is_its_content() -> None:
    model = model_of(config(*CONTENT))
    output = encode(model)
    assert model.item_tower.identity is None and "identity" not in output.present
    assert output.mass.shape == (ITEMS, 3)
    torch.testing.assert_close(output.vectors[BARE], output.vectors[NOTHING])
    known = model_of(config(*CONTENT), trained=None)
    assert torch.equal(encode(known).vectors, output.vectors)


@pytest.mark.parametrize("modalities", [ALL, CONTENT, ("text",), ("identity", "table")])
def test_a_selection_of_items_is_encoded_as_in_the_whole(modalities: tuple[str, ...]) -> None:
    model, items = model_of(config(*modalities)), torch.tensor([5, 9, 0, 5, 4])
    part, whole = encode(model, items=items), encode(model)
    torch.testing.assert_close(part.vectors, whole.vectors[items])
    torch.testing.assert_close(part.mass, whole.mass[items])


def test_content_reaches_the_vector_and_only_its_own_items() -> None:
    model, content = model_of(config()), inputs()
    for name in ("text", "image"):
        tokens = content.tokens[name]
        values = tokens.values.clone()
        values[tokens.offsets[3] : tokens.offsets[4]] += 1
        changed = dataclasses.replace(content, tokens={**content.tokens, name: tokens._replace(values=values)})
        moved = (encode(model, content).vectors != encode(model, changed).vectors).any(1)
        assert moved.nonzero()[:, 0].tolist() == [3], name


def test_the_slot_of_a_token_matters() -> None:
    model, content = model_of(config()), inputs()
    text = content.tokens["text"]
    changed = dataclasses.replace(content, tokens={**content.tokens, "text": text._replace(kind=1 - text.kind)})
    moved = (encode(model, content).vectors != encode(model, changed).vectors).any(1)
    assert torch.equal(moved, text.present)


def hidden_share(rates: dict[str, float], training: bool) -> torch.Tensor:
    """`[I, M]`: how often of 300 times a modality's mass was 0."""
    output = encode(model_of(config(**rates)).train(training), items=EVERY.repeat(300))
    return (output.mass == 0).view(300, ITEMS, -1).double().mean(0)


def present_everywhere() -> torch.Tensor:
    present = {**inputs().present(), "identity": torch.from_numpy(TRAINED)}
    return torch.stack([present[name] for name in ALL], 1)


def test_identity_dropout_hides_identities_in_training_only() -> None:
    present = present_everywhere()
    never = 1 - present.double()
    assert torch.equal(hidden_share({"identity_dropout": 0.3}, training=False), never)
    share = hidden_share({"identity_dropout": 0.3}, training=True)
    assert torch.equal(share[:, 1:], never[:, 1:])
    has_content = present[:, 1:].any(1)
    rate = share[present[:, 0] & has_content, 0]
    # 300 draws of a coin of .3: five standard deviations are .132.
    assert ((rate - 0.3).abs() < 0.132).all() and abs(float(rate.mean()) - 0.3) < 0.05
    assert share[BARE, 0] == 0


def test_modality_dropout_never_takes_everything() -> None:
    present = present_everywhere()
    share = hidden_share({"modality_dropout": 0.6, "identity_dropout": 0.6}, training=True)
    one = present.sum(1) == 1
    assert one.any() and torch.equal(share[one], 1 - present[one].double())
    several = present & ~one.unsqueeze(1)
    assert ((share[several] > 0.1) & (share[several] < 0.6 + 0.15)).all()
    model = model_of(config(modality_dropout=0.6, identity_dropout=0.6)).train()
    mass = encode(model, items=EVERY.repeat(20)).mass
    assert torch.equal(mass.sum(1) > 0, present.any(1).repeat(20))


def test_without_dropout_training_and_eval_agree() -> None:
    for modalities in (ALL, CONTENT, ("identity",)):
        model = model_of(config(*modalities))
        assert torch.equal(encode(model).vectors, encode(model.train()).vectors)


def test_content_dropout_acts_in_training_only() -> None:
    model = model_of(config("text", content_dropout=0.5))
    assert torch.equal(encode(model).vectors, encode(model).vectors)
    model.train()
    moved = (encode(model).vectors != encode(model).vectors).any(1)
    assert torch.equal(moved, inputs().tokens["text"].present)


def test_whitening_is_fitted_on_the_given_items_only() -> None:
    content = inputs()
    tokens = content.tokens["text"]
    values = tokens.values.clone()
    values[tokens.offsets[COLD] : tokens.offsets[COLD + 1]] *= 100
    other = dataclasses.replace(content, tokens={**content.tokens, "text": tokens._replace(values=values)})
    tower = ItemTower(config(), content.spec).double()
    fitted = []
    for each in (content, other):
        tower.fit_whitening(each, torch.from_numpy(KNOWN))
        fitted.append({name: value.clone() for name, value in tower.whiten.state_dict().items()})
    assert set(fitted[0]) == {"text.mean", "text.matrix", "image.mean", "image.matrix"}
    assert all(torch.equal(fitted[0][name], fitted[1][name]) for name in fitted[0])
    assert fitted[0]["text.matrix"].shape == (6, 4) and fitted[0]["image.matrix"].shape == (5, 3)
    assert fitted[0]["text.mean"].any()


def test_whitening_beforehand_gives_the_same_bits() -> None:
    model = model_of(config(content_dropout=0.4, identity_dropout=0.3)).train()
    content = inputs()
    white = model.item_tower.whiten_inputs(content)
    assert white.whitened and not content.whitened
    assert white.tokens["text"].values.shape[1] == 4 and white.tokens["image"].values.shape[1] == 3
    found = []
    for each in (content, white, white.to("cpu")):
        torch.manual_seed(5)
        found.append(encode(model, each))
    assert all(torch.equal(other.vectors, found[0].vectors) for other in found[1:])
    assert torch.equal(model.item_vectors(white).vectors, model.item_vectors(content).vectors)


def test_whitened_inputs_are_neither_whitened_again_nor_given_other_texts() -> None:
    tower = model_of(config()).item_tower
    white = tower.whiten_inputs(inputs())
    with pytest.raises(ValueError, match="inputs are whitened already"):
        tower.whiten_inputs(white)
    with pytest.raises(ValueError, match="inputs are whitened; text can be replaced only before that"):
        white.with_text(white.tokens["text"].values)


def test_no_experts_means_no_routing() -> None:
    model = model_of(config(experts_shared=0, experts_private=0))
    output = encode(model)
    assert output.routing is None and output.vectors.isfinite().all()
    assert not any("experts" in name for name, _ in model.named_parameters())


def test_experts_are_routed_by_modality() -> None:
    routing = encode(model_of(config())).routing
    assert routing is not None
    # Expert 0 is shared, expert 1 + m belongs to modality m; both slots of every token are used.
    cells = inputs().table.present().sum()  # type: ignore[union-attr]
    tokens = torch.tensor([len(inputs().tokens["text"].values), len(inputs().tokens["image"].values), int(cells)])
    expected = torch.zeros(3, 4).double()
    expected[:, 0] = tokens
    expected[range(3), range(1, 4)] = tokens.double()
    assert torch.equal(routing.stats[..., 0].double(), expected)


def test_pooled_is_the_mean_token_of_each_modality() -> None:
    model, content = model_of(config()), inputs()
    tower = model.item_tower
    output = encode(model)
    assert set(output.pooled) == set(ALL) and tower.identity is not None and tower.table is not None
    for name in ("text", "image"):
        tokens = content.tokens[name]
        values = tower.project[name](tower.whiten[name](tokens.values, tokens.kind)) + tower.slot[name][tokens.kind]
        parts = values.split(tokens.offsets.diff().tolist())
        expected = torch.stack([part.mean(0) if len(part) else torch.zeros(8).double() for part in parts])
        torch.testing.assert_close(output.pooled[name], expected)
    assert content.table is not None
    torch.testing.assert_close(output.pooled["table"], tower.table(content.table).mean())
    # Identities start with a deviation of .05; among the content tokens they have the scale of those.
    torch.testing.assert_close(output.pooled["identity"], tower.identity / 0.05)


def test_a_modality_that_the_data_lacks() -> None:
    with pytest.raises(ValueError, match=r"modalities \['audio'\] are not in the data, which has \['identity', 'text'"):
        ItemTower(config("identity", "audio"), inputs().spec)
    with pytest.raises(ValueError, match=r"modalities \['table'\] are not in the data"):
        ItemTower(config("table"), ItemSpec(3))
    with pytest.raises(ValueError, match="inputs must hold the table"):
        encode(model_of(config("table")), dataclasses.replace(inputs(), table=None))


def test_a_feature_file_is_a_modality_of_its_own() -> None:
    content = inputs()
    named = dataclasses.replace(content, tokens={"audio": content.tokens["image"]}, table=None, table_spec=None)
    tower = ItemTower(config("audio", text_rank=2, image_rank=5), named.spec).double().eval()
    output = tower(named, EVERY, torch.from_numpy(TRAINED))
    assert tower.whiten["audio"].matrix.shape == (5, 2) and output.mass.shape == (ITEMS, 1)


def test_identity_is_added_past_the_attention_where_it_is_known():
    model = model_of(config())
    fused = []
    model.item_tower.fuse.register_forward_hook(lambda module, arguments, output: fused.append(output.values))
    items = torch.arange(ITEMS)
    vectors = model.encode(inputs(), items).vectors
    known = torch.from_numpy(TRAINED).unsqueeze(1)
    identity = torch.where(known, model.item_tower.identity, 0)
    torch.testing.assert_close(vectors, fused[0] * model.item_tower.gain * 0.05 + identity)


DISENTANGLE = ["contrast", "attention", "prototypes", "vae"]


@pytest.mark.parametrize("kind", DISENTANGLE)
def test_a_disentanglers_vector_is_added_behind_a_gate(kind: str) -> None:
    model = model_of(config(disentangle=kind))
    tower = model.item_tower
    assert tower.disentangle is not None
    opened = encode(model)
    fresh = Recommender(config(disentangle=kind), inputs().spec, TRAINED)
    assert fresh.item_tower.disentangle_gate == 0
    with torch.no_grad():
        tower.disentangle_gate.zero_()
    closed = encode(model)
    plain = model_of(config())
    plain.item_tower.load_state_dict(tower.state_dict(), strict=False)
    torch.testing.assert_close(closed.vectors, encode(plain).vectors)
    with torch.no_grad():
        tower.disentangle_gate.fill_(0.4)
    opened = encode(model)
    parts = tower.disentangle(encode(plain).pooled, closed.present)
    added = torch.tanh(torch.tensor(0.4)) * parts.vector * tower.gain * 0.05
    torch.testing.assert_close(opened.vectors - closed.vectors, added)
    assert added[KNOWN].any(1).all() and not added[NOTHING].any()
    for name, aligned in parts.aligned.items():
        torch.testing.assert_close(opened.pooled[name], aligned)
    assert opened.parts is not None and set(opened.parts.losses) == set(parts.losses) and encode(plain).parts is None


@pytest.mark.parametrize("kind", DISENTANGLE)
def test_a_cold_items_identity_is_not_read_by_a_disentangler_either(kind: str) -> None:
    model = model_of(config(disentangle=kind))
    before = encode(model)
    assert model.item_tower.identity is not None
    with torch.no_grad():
        model.item_tower.identity[[COLD, NOTHING]] += 3.0
    assert torch.equal(encode(model).vectors, before.vectors)
    alone = model_of(config("identity", disentangle=kind))
    assert encode(alone).parts is None, "there is nothing to take apart"


@pytest.mark.parametrize("kind", DISENTANGLE)
def test_what_a_training_step_hides_is_hidden_from_the_disentangler(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config(disentangle=kind, modality_dropout=0.99)).train()
    seen = {}
    tower = model.item_tower
    assert tower.disentangle is not None
    forward = tower.disentangle.forward
    monkeypatch.setattr(tower.disentangle, "forward", lambda v, p: (seen.update(p), forward(v, p))[1])
    torch.manual_seed(0)
    output = encode(model)
    hidden = output.mass == 0
    for m, name in enumerate(ALL):
        assert torch.equal(seen[name], ~hidden[:, m]), name
        assert torch.equal(output.present[name], seen[name]), "what is hidden is not aligned either"
    there = encode(model_of(config(disentangle=kind))).present
    assert any((there[name] & ~seen[name]).any() for name in CONTENT)
