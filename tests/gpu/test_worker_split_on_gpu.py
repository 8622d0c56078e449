"""A model split over two GPUs gives generate's greedy tokens, and each GPU holds its own part of it."""

from pathlib import Path

import pytest
import torch

from rigs.splitting import KINDS, PROMPTS, expected, given, options, split_model, split_runner

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"this machine has {torch.cuda.device_count()} GPUs, and a model needs two"
)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_generate_alone_and_in_mixed_batches_in_fp32(kind: str, tmp_path: Path) -> None:
    tokens = expected(split_model(tmp_path, kind).to("cuda"), PROMPTS)
    with split_runner(options(tmp_path, "cuda")) as runner:
        assert any("CUDA graphs are not captured" in remark for remark in runner.ready(0).remarks)
        for at_once in (1, 6):
            found, parts = given(runner, runner.blocks(), PROMPTS, at_once, "cuda")
            assert found == tokens
        assert sum(part.cached_tokens for part in parts) > 0, "no prefix was found"
