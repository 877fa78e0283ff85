"""transformers mixtures that compute with `mixture_of_experts`: against their eager experts, on and off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from interface_helpers import BATCH, LENGTH, ids, results
from torch import Tensor
from transformers.integrations.moe import use_experts_implementation

from mmrec.llm import kernel_experts, register_experts, unregister_experts

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
QWEN: dict[str, Any] = {
    **SIZES, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}  # fmt: skip


def mixtral(**changes: Any) -> Any:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    )


def ernie_text() -> Any:
    """Text experts and vision experts of other widths, a router for each, and experts for everybody."""
    config = hf.Ernie4_5_VLMoeConfig(
        text_config={
            **SIZES, "moe_intermediate_size": [24, 16], "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
            "mlp_layer_types": ["sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    )  # fmt: skip
    return hf.Ernie4_5_VLMoeTextModel(config.text_config)


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral,
    "mixtral, gelu": lambda: mixtral(hidden_act="gelu"),
    "mixtral, one expert": lambda: mixtral(num_local_experts=1, num_experts_per_tok=1),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20)),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**QWEN, head_dim=12)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2)),
    "ernie-4.5-vl": ernie_text,
}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    unregister_experts()


def given_to(model: Any) -> dict[str, Tensor]:
    if "Ernie" not in type(model).__name__:
        return {"input_ids": ids()}
    return {"input_ids": ids(), "moe_mm_token_type_ids": (ids() % 3 == 0).int()}


def assert_as_eager(model: Any, given: dict[str, Tensor]) -> None:
    """In float32, both round on their way: held to 2e-5 of the largest element, as attention's are."""
    model.eval().set_experts_implementation("eager")
    eager = results(model, given)
    with kernel_experts(model):
        ours = results(model, given)
    assert len(ours) == len(eager)
    largest = max(float(b.abs().max()) for b in eager)
    for a, b in zip(ours, eager, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6 * largest


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model = MODELS[name]()
    assert_as_eager(model, given_to(model))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The named arguments of each call of the op from here on."""
    import mmrec.llm.experts

    calls: list[dict[str, Any]] = []
    mix = mmrec.llm.experts.mixture_of_experts

    def spy(*rest: Any, **named: Any) -> Any:
        calls.append({"x": rest[0], "w_in": rest[2], **named})
        return mix(*rest, **named)

    monkeypatch.setattr(mmrec.llm.experts, "mixture_of_experts", spy)
    return calls


def test_each_layer_calls_the_op_once_with_its_weights_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = calls_of(monkeypatch), mixtral().eval()
    with kernel_experts(model), torch.no_grad():
        model(input_ids=ids())
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert [call["w_in"].data_ptr() for call in calls] == [e.gate_up_proj.data_ptr() for e in experts]
    assert all(call["x"].shape == (BATCH * LENGTH, 32) and call["activation"] == "swiglu" for call in calls)


def test_generation() -> None:
    model = mixtral().eval()
    model.set_experts_implementation("eager")
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    expected = model.generate(input_ids=ids(), **options)
    with kernel_experts(model):
        found = model.generate(input_ids=ids(), **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_in_bfloat16_it_is_as_near_to_the_exact_result_as_eager() -> None:
    """Of the experts alone: a router's near ties fall differently under any other rounding."""
    model = mixtral().bfloat16().eval()
    experts, index = model.model.layers[0].mlp.experts, torch.stack([torch.randperm(4)[:2] for _ in range(200)])
    x, weights = torch.randn(200, 32).bfloat16(), torch.rand(200, 2)
    model.set_experts_implementation("eager")
    exact = copy.deepcopy(experts).double()(x.double(), index, weights.double())
    eager = (experts(x, index, weights) - exact).norm()
    with kernel_experts(model):
        ours = experts(x, index, weights)
    assert ours.dtype == torch.bfloat16 and (ours - exact).norm() <= eager


class Alone(torch.nn.Module):
    """A class of experts by itself, as transformers' own are written; its eager forward is the formula."""

    def __init__(self, config: Any, up_rows: int = 2) -> None:
        super().__init__()
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise AssertionError("computed by something else")


class Config:
    _experts_implementation = "mmrec"


def alone(activation: Any = None, **kind: Any) -> Any:
    """Experts of 4 x 6 to 5 and back, with `kind` as transformers' decorator takes it."""
    register_experts()
    made = use_experts_implementation(type("Alone", (Alone,), {}), **kind)(Config())
    rows = 10 if kind.get("has_gate", True) else 5
    name = "gate_up_proj" if kind.get("has_gate", True) else "up_proj"
    shapes = {name: (4, rows, 6), "down_proj": (4, 6, 5)}
    for parameter, shape in shapes.items():
        value = torch.randn(*shape, dtype=torch.float64)
        setattr(made, parameter, torch.nn.Parameter(value.mT.contiguous() if kind.get("is_transposed") else value))
        if kind.get("has_bias"):
            setattr(made, f"{parameter}_bias", torch.nn.Parameter(torch.randn(4, shape[1], dtype=torch.float64)))
    if activation is not None:
        del made.act_fn  # a function may not take a module's place
        made.act_fn = activation
    return made


def by_hand(made: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    name = "gate_up_proj" if made.has_gate else "up_proj"
    rows = []
    for row, experts, shares in zip(x, index.tolist(), weights, strict=True):
        mixed = torch.zeros_like(row)
        for e, share in zip(experts, shares, strict=True):
            if e >= 4:
                continue
            w_in, w_out = getattr(made, name)[e], made.down_proj[e]
            if made.is_transposed:
                w_in, w_out = w_in.T, w_out.T
            hidden = w_in @ row + (getattr(made, f"{name}_bias")[e] if made.has_bias else 0)
            hidden = made.act_fn(hidden[:5]) * hidden[5:] if made.has_gate else made.act_fn(hidden)
            mixed = mixed + share * (w_out @ hidden + (made.down_proj_bias[e] if made.has_bias else 0))
        rows.append(mixed)
    return torch.stack(rows)


def routed() -> tuple[Tensor, Tensor, Tensor]:
    index = torch.tensor([[0, 3], [1, 0], [3, 2], [2, 1], [0, 1], [1, 3], [2, 0]])
    return torch.randn(7, 6, dtype=torch.float64), index, torch.rand(7, 2, dtype=torch.float64)


ACT = hf.activations.ACT2FN


@pytest.mark.parametrize(
    "activation, kind",
    [
        (None, {"is_transposed": True}),
        (None, {"is_transposed": True, "has_bias": True}),
        (torch.nn.GELU(), {"has_bias": True}),
        (ACT["relu2"], {"has_gate": False}),
        (ACT["relu"], {"has_gate": False}),
        (ACT["gelu"], {"has_gate": False, "has_bias": True}),
        (ACT["linear"], {"has_gate": False, "is_transposed": True}),
        (torch.nn.functional.silu, {}),
    ],
)
def test_every_kind_of_experts(activation: Any, kind: dict[str, bool]) -> None:
    made, given = alone(activation, **kind), routed()
    torch.testing.assert_close(made(*given), by_hand(made, *given))


def test_transformers_that_say_less_of_their_experts() -> None:
    """Transformers 5.0 knew biases and transposed weights only."""
    made, given = alone(has_bias=True), routed()
    expected = by_hand(made, *given)
    for name in ("has_gate", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel"):
        delattr(made, name)
    torch.testing.assert_close(made(*given), expected)


def test_ids_of_other_processes_add_nothing() -> None:
    made, (x, index, weights) = alone(), routed()
    made._is_expert_parallel = True
    index[2, 1] = index[4] = 4
    weights[index == 4] = torch.nan
    torch.testing.assert_close(made(x, index, weights), by_hand(made, x, index, weights))


@pytest.mark.parametrize(
    "activation, kind, message",
    [
        (ACT["gelu_pytorch_tanh"], {}, "have no activation .*, which Alone asks for"),
        (torch.nn.GELU("tanh"), {}, "have no activation GELU"),
        (ACT["relu"], {}, "have no activation ReLU"),
        (lambda x: x, {"has_gate": False}, "have no activation <function"),
        (None, {"is_concatenated": False}, "gates in front of ups, Alone has them interleaved"),
        (None, {"has_post_expert_norm": True}, "no norm behind each expert, as Alone has"),
    ],
)
def test_what_it_cannot_do_is_refused(activation: Any, kind: dict[str, bool], message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*experts_implementation='grouped_mm'"):
        alone(activation, **kind)(*routed())


def test_a_gate_of_the_models_own_is_refused() -> None:
    made = alone()
    made._apply_gate = lambda rows: rows.clamp(max=7.0)
    with pytest.raises(ValueError, match="have no gate like that of Alone"):
        made(*routed())
    del made._apply_gate
    type(made)._apply_gate = lambda self, rows: rows.clamp(max=7.0)
    with pytest.raises(ValueError, match="have no gate like that of Alone"):
        made(*routed())
    config = hf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    model = hf.GptOssForCausalLM(config).eval()
    with kernel_experts(model), pytest.raises(ValueError, match="GptOssExperts"):
        model(input_ids=ids())


def test_it_ends_with_its_block_and_after_errors() -> None:
    model = mixtral().eval()
    model.set_experts_implementation("batched_mm")
    with pytest.raises(RuntimeError, match="planned"), kernel_experts(model):
        assert model.config._experts_implementation == "mmrec"
        raise RuntimeError("planned")
    assert model.config._experts_implementation == "batched_mm"


def test_parts_get_back_what_each_had() -> None:
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=ernie_text().config.to_dict(),
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    )
    model = hf.Ernie4_5_VLMoeForConditionalGeneration(config)
    model.set_experts_implementation({"": "grouped_mm", "text_config": "eager"})
    before = [m.config._experts_implementation for m in model.modules() if isinstance(m, hf.PreTrainedModel)]
    assert {"grouped_mm", "eager"} <= set(before)
    with kernel_experts(model):
        assert model.config.text_config._experts_implementation == "mmrec"
    after = [m.config._experts_implementation for m in model.modules() if isinstance(m, hf.PreTrainedModel)]
    assert after == before


def test_with_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(mixtral(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    model.set_experts_implementation("eager")
    given = {"input_ids": ids()}
    eager = results(model, given)
    with kernel_experts(model):
        ours = results(model, given)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-6)
    assert model.config._experts_implementation == "eager"


def test_a_model_without_experts_is_refused() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="model LlamaForCausalLM has no experts that can be chosen"):
        with kernel_experts(model):
            raise AssertionError("not reached")


def test_the_name_is_gone_when_taken_out() -> None:
    model = mixtral().eval()
    register_experts()
    model.set_experts_implementation("mmrec")
    model(input_ids=ids())
    unregister_experts()
    with pytest.raises(KeyError, match="mmrec"):
        model(input_ids=ids())


def test_it_compiles_into_one_graph() -> None:
    made, given = alone(), routed()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), made(*given))
