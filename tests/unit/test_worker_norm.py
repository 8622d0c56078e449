"""Normalisations of the engine on a CPU: one kernel instead of seven, and only where the same comes out."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gpumeter_worker.engine.norm import OneKernelRmsNorm, quicken_norms

FEATURES = 96


def model_of(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return nn.ModuleDict({"norm": norm}).to(dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_a_normalisation_of_bfloat16_becomes_one_kernel_that_is_no_less_precise(kind: type[nn.Module]) -> None:
    model = model_of(kind(FEATURES, 1e-5), torch.bfloat16)
    own = model.norm
    with torch.inference_mode():
        assert quicken_norms(model) == 1
        assert isinstance(model.norm, OneKernelRmsNorm)
        for rows in (torch.randn(1, 7, FEATURES), 40 * torch.randn(3, 2, FEATURES), 1e-3 * torch.randn(1, 1, FEATURES)):
            given = rows.bfloat16()
            wide = given.float()
            exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * own.weight.float()
            found = model.norm(given)
            assert found.dtype is torch.bfloat16 and found.shape == given.shape
            assert (found - exact).abs().mean() <= (own(given) - exact).abs().mean() * 1.001


def test_one_that_scales_by_something_else_than_its_weight_is_left_alone() -> None:
    model = model_of(Gemma2RMSNorm(FEATURES, 1e-5), torch.bfloat16)
    with torch.inference_mode():
        assert quicken_norms(model) == 0
    assert type(model.norm) is Gemma2RMSNorm


def test_in_float32_every_bit_stays_as_the_model_computes_it() -> None:
    model = model_of(LlamaRMSNorm(FEATURES, 1e-5), torch.float32)
    with torch.inference_mode():
        assert quicken_norms(model) == 0


def test_a_compiler_sees_the_models_own_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(LlamaRMSNorm(FEATURES, 1e-5), torch.bfloat16)
    with torch.inference_mode():
        quicken_norms(model)
        rows = torch.randn(1, 5, FEATURES).bfloat16()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(model.norm(rows), model.norm.own(rows))
