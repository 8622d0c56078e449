"""A model split over two ranks on the CPU gives the tokens of one rank and of `generate`, however it is batched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gpumeter_worker.engine.blocks import SlotBlocks
from gpumeter_worker.engine.sequence import Sequence
from rigs.paged import SIZE
from rigs.splitting import KINDS, PROMPTS, expected, given, options, split_model, split_runner

pytestmark = pytest.mark.shared


class Served(NamedTuple):
    """A split model that is ready, the folder that it came from, and what `generate` says."""

    runner: Any
    folder: Path
    expected: list[list[int]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("split")
    tokens = expected(split_model(folder, next(iter(KINDS))), PROMPTS)
    assert all(len(set(one)) > 2 for one in tokens), "a model that repeats itself proves nothing"
    with split_runner(options(folder)) as runner:
        yield Served(runner, folder, tokens)


class ScarceSlots(SlotBlocks):
    """With every slot in use there is now and then no room for a sequence's next token, until somebody has gone."""

    def grow(self, sequence: Sequence, count: int) -> bool:
        return None in self._holder or bool(sequence.generated % 3)


def test_alone_a_request_gets_the_tokens_of_one_rank_and_of_generate(served: Served) -> None:
    from gpumeter_worker.engine.model import ModelRunner

    found, _ = given(served.runner, SlotBlocks(3, 128, prefix=False), PROMPTS, at_once=1)
    whole, _ = given(ModelRunner(options(served.folder, ranks=1)), SlotBlocks(3, 128, prefix=False), PROMPTS, at_once=1)
    assert found == whole == served.expected


def test_mixed_with_chunks_and_with_prefixes_found_in_other_slots(served: Served) -> None:
    found, parts = given(served.runner, SlotBlocks(3, 128, prefix=True), PROMPTS, at_once=6)
    assert found == served.expected
    assert any(part.prefill and part.context_tokens for part in parts), "no prompt came in chunks"
    assert sum(part.cached_tokens for part in parts) > 0, "no prefix was found"


def test_what_preemptions_lost_is_computed_again(served: Served) -> None:
    found, parts = given(served.runner, ScarceSlots(3, 128, prefix=False), PROMPTS, at_once=6)
    assert found == served.expected
    assert any(part.recompute for part in parts), "nobody was preempted"


def test_who_is_cancelled_leaves_its_slot_to_the_next_on_every_rank(served: Served) -> None:
    found, _ = given(served.runner, SlotBlocks(3, 128, prefix=True), PROMPTS, at_once=6, cancelled="1")
    assert found[1] == served.expected[1][: len(found[1])]
    assert len(found[1]) < len(served.expected[1])
    assert [*found[:1], *found[2:]] == [*served.expected[:1], *served.expected[2:]]


def test_each_rank_holds_its_own_heads_of_the_cache_and_readiness_tells_the_whole(served: Served) -> None:
    ready = served.runner.ready(0)
    assert ready.kv_token_bytes == 2 * 2 * SIZE["num_key_value_heads"] * SIZE["head_dim"] * 4
    assert served.runner._loaded.kv_token_bytes == ready.kv_token_bytes // 2
    first = served.runner._loaded.model.model.layers[0]
    assert {type(layer).__name__ for layer in (first.self_attn.o_proj, first.mlp.down_proj)} == {"Summed"}
    assert (ready.max_batch_size, ready.cache_tokens, ready.vocabulary) == (3, 3 * 128, SIZE["vocab_size"])


REFUSED = {
    "heads that cannot be shared out": (
        {"config": "LlamaConfig", "num_key_value_heads": 2},
        4,
        "its 4 attention heads and 2 heads of keys and values cannot be shared out evenly among 4 GPUs; set "
        "spec.parallelism.tensor and spec.resources.gpu.count to 1 or 2, or serve another model than llama",
    ),
    "a type that transformers has no plan for": (
        {"config": "GPT2Config"},
        2,
        "transformers has no plan to split a model of the type gpt2 over 2 GPUs; set spec.parallelism.tensor and "
        "spec.resources.gpu.count to 1, or serve another model than gpt2",
    ),
    "layers that this engine does not split": (
        {"config": "MixtralConfig", "num_local_experts": 2},
        2,
        "the plan to split a model of the type mixtral has layers of the kind",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_split_is_refused_before_its_weights_are_read(kind: str, tmp_path: Path) -> None:
    import transformers

    from gpumeter_worker.engine.loading import LoadFailed, load

    changes, ranks, said = REFUSED[kind]
    values = SIZE | {"num_hidden_layers": 1} | changes
    config = getattr(transformers, values.pop("config"))(**values)
    config.save_pretrained(tmp_path)
    with pytest.raises(LoadFailed) as refused:
        load(options(tmp_path, ranks=ranks), "nobody's")
    assert str(refused.value).startswith(said)
    assert refused.value.reason == "ModelInvalid"
