"""vLLM's CPU build, its engine in this process and stepped by hand, as its own `LLM.generate` does it."""

import torch
import transformers
import vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from bench.engines.serving import Setup, Stepping, serve


class Vllm(Stepping):
    """`mode` is eager or compiled. Text is not made: the others make none either."""

    def __init__(self, setup: Setup) -> None:
        self._llm = LLM(
            setup.model,
            dtype="bfloat16",
            enforce_eager=setup.mode == "eager",
            max_model_len=setup.model_len,
            max_num_seqs=setup.sequences,
            max_num_batched_tokens=setup.step_tokens,
            enable_prefix_caching=False,
        )

    def about(self) -> dict[str, str]:
        """See Engine."""
        own = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return {**own, "remarks": ""}

    def submit(self, name: str, prompt: list[int], new: int, *, stream: bool) -> None:
        """See Stepping."""
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        wish = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False, output_kind=kind)
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, wish)

    def step(self) -> list[tuple[str, int]]:
        """See Stepping."""
        return [(one.request_id, len(one.outputs[0].token_ids)) for one in self._llm.llm_engine.step()]


if __name__ == "__main__":
    serve(Vllm)
