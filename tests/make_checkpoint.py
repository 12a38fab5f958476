"""Write a random two-layer Llama with a byte vocabulary, for the tests and for trying the commands without a download.

    python tests/make_checkpoint.py runs/random

It has learned nothing: what it writes is noise, and its rewards are 0."""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import UserError, cli  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from tokenizer import byte_alphabet  # noqa: E402


def make_checkpoint(folder, seed=0, end="<|endoftext|>", **changes):
    """`end`: the token that ends a document; '<|im_end|>' and '<|eot_id|>' make it a chat model, the latter with a BOS."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    if end == "<|eot_id|>":
        special |= {"<|eot_id|>": 259, "<|start_header_id|>": 260, "<|end_header_id|>": 261, "<|begin_of_text|>": 262}
    vocab = {c: b for c, b in byte_alphabet().items()}
    tokenizer = {"version": "1.0", "normalizer": None, "post_processor": None,
                 "added_tokens": [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
                                   "normalized": False} for t, i in special.items()],
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                 "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 264, "hidden_size": 48, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 1024,
              "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "eos_token_id": 256,
              "torch_dtype": "float32"} | changes
    for name, value in (("tokenizer.json", tokenizer), ("config.json", config),
                        ("tokenizer_config.json", {"eos_token": end, "bos_token": "<|begin_of_text|>", "add_bos_token": end == "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"})):
        (folder / name).write_text(json.dumps(value))
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_folder(folder), folder)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.15)
    model.save_pretrained(folder / "weights")  # it refuses a folder that exists: so beside, and then in place
    (folder / "weights" / "model.safetensors").replace(folder / "model.safetensors")
    for file in (folder / "weights").iterdir():
        file.unlink()
    (folder / "weights").rmdir()
    return folder


def main():
    if len(sys.argv) != 2:
        raise UserError("usage: python tests/make_checkpoint.py FOLDER")
    print(f"wrote {make_checkpoint(sys.argv[1])}")


if __name__ == "__main__":
    cli(main)
