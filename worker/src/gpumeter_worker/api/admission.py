"""From a request to the sequences of its session: what is run, and whether the model and the queue can hold it.

Pure. Owns the order of choices (a prompt's answers stand together), their seeds, and the refusals that need to know
the model's size. Does not know how long the queue is now; the worker does.
"""

import hashlib
from collections.abc import Sequence

from gpumeter_worker.api.errors import Refused, bad_parameter
from gpumeter_worker.api.parameters import Generation
from gpumeter_worker.api.sessions import Choice
from gpumeter_worker.engine.messages import Ready
from gpumeter_worker.engine.sequence import Sampling


def choices(
    generation: Generation, prompts: Sequence[list[int]], engine: Ready, max_queue_length: int, param: str
) -> list[Choice]:
    """Choice number prompt * n + answer for every prompt and each of its n answers. Raises Refused (400).

    `param` is the field that the prompts came in.
    """
    if generation.n > engine.max_batch_size:
        raise bad_parameter(
            "n", f"n is {generation.n}; this worker runs {engine.max_batch_size} sequences at once and gives no more"
        )
    wanted, most = len(prompts) * generation.n, engine.max_batch_size + max_queue_length
    if wanted > most:
        raise bad_parameter(
            param, f"{wanted} answers are asked for; this worker takes {most} at most; send several requests"
        )
    made = []
    for prompt in prompts:
        if prompt and max(prompt) >= engine.vocabulary:
            # A tokenizer may know more tokens than its model, and such an id would end the engine for everybody.
            raise bad_parameter(
                param, f"the prompt has the token {max(prompt)}, and this model's last one is {engine.vocabulary - 1}"
            )
        room = _room(generation, prompt, engine.max_model_len, param)
        made += [
            Choice(prompt, _sampling(generation, room, answer), counts_prompt=answer == 0)
            for answer in range(generation.n)
        ]
    return made


def too_long(length: int, max_model_len: int, param: str, more: str = "") -> Refused:
    """The refusal of a prompt that the model cannot hold, with the number of its tokens."""
    return bad_parameter(
        param, f"the prompt has {length} tokens{more}; this model holds {max_model_len}", "context_length_exceeded"
    )


def _room(generation: Generation, prompt: list[int], max_model_len: int, param: str) -> int:
    """How many tokens may follow."""
    if not prompt:
        raise bad_parameter(param, "the prompt has no tokens")
    room = max_model_len - len(prompt)
    if room < 1:
        raise too_long(len(prompt), max_model_len, param)
    if generation.max_tokens and room < generation.max_tokens:
        more = f" and {generation.max_tokens} more are asked for"
        raise too_long(len(prompt), max_model_len, generation.max_tokens_param, more)
    if room < generation.min_tokens:
        raise too_long(len(prompt), max_model_len, "min_tokens", f" and at least {generation.min_tokens} must follow")
    return room


def _sampling(generation: Generation, room: int, answer: int) -> Sampling:
    return Sampling(
        max_tokens=generation.max_tokens or min(room, max(generation.usual_tokens or room, generation.min_tokens)),
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        repetition_penalty=generation.repetition_penalty,
        frequency_penalty=generation.frequency_penalty,
        presence_penalty=generation.presence_penalty,
        logit_bias=generation.logit_bias,
        seed=_seed(generation.seed, answer),
        min_tokens=generation.min_tokens,
        stop_ids=generation.stop_ids,
        ignore_eos=generation.ignore_eos,
        logprobs=generation.logprobs,
    )


def _seed(seed: int | None, answer: int) -> int | None:
    """The first answer is the one that n = 1 gives; the others have seeds that no neighbouring request has.

    Never negative: Python's generator takes -5 for 5, so negative seeds become those that no client can ask for.
    """
    if seed is None:
        return None
    if answer == 0:
        return seed % 2**64
    return int.from_bytes(hashlib.sha256(f"{seed}/{answer}".encode()).digest()[:8]) >> 1
