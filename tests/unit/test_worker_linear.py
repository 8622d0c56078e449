"""Matrix products of the engine on a CPU: the same numbers as torch's own linear layers, whoever shares what."""

import pytest
import torch
from torch import nn

from gpumeter_worker.engine.linear import PackedLinear, Product, SharedLinear, pack_linears, padded_rows

DTYPES = [torch.float32, torch.bfloat16]


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, *, bias: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 48, bias=bias)
        self.k_proj = nn.Linear(32, 16, bias=bias or odd)
        self.v_proj = nn.Linear(32, 16, bias=bias)
        self.o_proj = nn.Linear(48, 32, bias=bias)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(rows), self.k_proj(rows), self.v_proj(rows)
        return self.o_proj(query * torch.cat((key, value, key), -1))


class Crossed(Attention):
    """Looks for keys and values elsewhere than for queries, and asks for one of them twice."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        query, key, value = self.q_proj(rows), self.k_proj(rows * 2), self.v_proj(rows * 2)
        return self.o_proj(query * torch.cat((key, value, self.k_proj(rows)), -1))


@pytest.fixture(autouse=True)
def inference() -> object:
    torch.manual_seed(5)
    with torch.inference_mode():
        yield


def agrees(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = 1e-5 if wanted.dtype is torch.float32 else 2e-2
    return torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [Attention, Crossed])
def test_a_packed_model_computes_what_it_computed_before(dtype: torch.dtype, bias: bool, kind: type[Attention]) -> None:
    model = nn.Sequential(kind(bias=bias), kind(bias=bias)).to(dtype)
    steps = [torch.randn(1, rows, 32).to(dtype) for rows in (1, 3, 40, 3, 17, 65, 301)]
    wanted = [model(rows) for rows in steps]
    assert pack_linears(model, None)
    assert all(agrees(model(rows), before) for rows, before in zip(steps, wanted, strict=True))


def test_layers_that_are_given_the_same_rows_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()
    assert pack_linears(model, None)
    assert [type(model.get_submodule(name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")] == [
        SharedLinear,
        SharedLinear,
        SharedLinear,
        PackedLinear,
    ]
    asked: list[tuple[int, ...]] = []
    compute = Product.compute
    monkeypatch.setattr(Product, "compute", lambda self, rows: asked.append(tuple(rows.shape)) or compute(self, rows))
    model(torch.randn(5, 32))
    assert asked == [(5, 32), (5, 48)]


def test_nothing_of_a_step_is_kept_for_the_next() -> None:
    model = Attention()
    pack_linears(model, None)
    rows = torch.randn(2, 32)
    before = model(rows).clone()
    rows *= 3
    assert not torch.allclose(model(rows), before)


def test_siblings_of_another_make_keep_products_of_their_own() -> None:
    model = Attention(odd=True)
    rows = torch.randn(4, 32)
    wanted = model(rows)
    pack_linears(model, None)
    assert isinstance(model.q_proj, PackedLinear)
    assert agrees(model(rows), wanted)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 64])
def test_many_rows_in_float32_are_no_less_precise(rows: int) -> None:
    linear = nn.Linear(64, 96).bfloat16()
    given = torch.randn(rows, 64).bfloat16()
    exact = given.double() @ linear.weight.double().T + linear.bias.double()
    wide, narrow = Product([linear], wide_from=8), Product([linear], wide_from=1 << 62)
    off = [float((product.of(given).double() - exact).abs().max()) for product in (wide, narrow)]
    assert off[0] <= off[1] * 1.01 + 1e-6
    assert wide.of(given).dtype is torch.bfloat16


def test_a_layer_of_two_modules_is_packed_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    pack_linears(model, None)
    assert model[0][0]._product is model[1][0]._product


def test_modules_that_share_one_of_their_layers_keep_products_of_their_own() -> None:
    first, second = Attention(), Attention()
    second.q_proj = first.q_proj
    model = nn.Sequential(first, second)
    rows = torch.randn(4, 32)
    wanted = [module(rows) for module in model]
    pack_linears(model, None)
    assert all(agrees(module(rows), before) for module, before in zip(model, wanted, strict=True))


def test_any_number_of_rows_is_multiplied_as_one_of_few() -> None:
    padded = [padded_rows(rows) for rows in range(1, 4097)]
    assert all(rows <= found <= rows + max(7, rows // 8) for rows, found in enumerate(padded, 1))
    assert padded[:16] == list(range(1, 17))
    assert len(set(padded)) < 130


@pytest.mark.parametrize("wide_from", [20, 1 << 62])
def test_rows_that_are_padded_leave_no_trace(wide_from: int) -> None:
    linear = nn.Linear(32, 48).bfloat16()
    product = Product([linear], wide_from)
    rows = torch.randn(1, 37, 64).bfloat16()[..., ::2]  # not in one piece
    found = product.compute(rows)
    assert found.shape == (1, 37, 48)
    assert agrees(found, linear(rows))
