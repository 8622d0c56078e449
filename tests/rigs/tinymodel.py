"""A model of random weights that answers in no time, with SmolLM2's tokenizer: for tests of everything but the model.

Owns its size. What it says is noise: any bytes, whole characters or not.
"""

import shutil
from pathlib import Path

from rigs.worker import model_path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def tiny_model(folder: Path, kv_heads: int = 1) -> Path:
    """Write one of two narrow layers; the folder that a worker can serve."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(model_path() / name, folder / name)
    return folder
