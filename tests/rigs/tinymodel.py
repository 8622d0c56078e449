"""A model that loads in a moment: random weights of a few megabytes under SmolLM2's tokenizer.

Owns how it is made. What it says is nonsense; it is for tests of everything but what a model says.
"""

from pathlib import Path

from rigs.worker import model_path


def make(folder: Path) -> Path:
    """Write the model into a folder of its own and return that."""
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=transformers.AutoConfig.from_pretrained(model_path()).vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    target = folder / "tiny"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    for file in model_path().iterdir():
        if not (target / file.name).exists() and not file.name.endswith(".safetensors"):
            (target / file.name).symlink_to(file)
    return target
