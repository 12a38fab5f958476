"""Write a random two-layer Llama with a byte vocabulary, which has learned nothing."""
import json
import shutil
from pathlib import Path

import torch

from model import ModelConfig, Transformer
from support.checkpoint import read_config
from support.tokenizer import byte_alphabet

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 264,
          "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
          "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "hidden_act": "silu", "tie_word_embeddings": True, "eos_token_id": 256,
          "torch_dtype": "float32"}


def tokenizer_files(end):
    """(tokenizer.json, tokenizer_config.json): bytes are ids 0 to 255, special tokens follow."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if end == "<|eot_id|>":
        special += ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"]
    plain = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    added = []
    for i, text in enumerate(special, 256):
        added.append(plain | {"id": i, "content": text, "special": True})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    text, bos = {"Sequence": {"id": "A", "type_id": 0}}, special[-1]
    template = {"type": "TemplateProcessing", "pair": [text],
                "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, text],
                "special_tokens": {bos: {"id": bos, "ids": [added[-1]["id"]], "tokens": [bos]}}}
    tokenizer = {
        "version": "1.0", "normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level,
        "post_processor": template if end == "<|eot_id|>" else None, "added_tokens": added,
        "model": {"type": "BPE", "vocab": byte_alphabet(), "merges": []}}
    settings = {"eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    return tokenizer, settings


def make_checkpoint(folder, seed=0, end="<|endoftext|>", **changes):
    """A folder that load_pretrained and transformers open.

    end: the token that ends a document. '<|im_end|>' and '<|eot_id|>' make it a chat model, the
    latter with a BOS. changes: of config.json."""
    folder = Path(folder)
    draft = folder.with_name(folder.name + ".draft")    # save_pretrained refuses one that exists
    draft.mkdir(parents=True)
    tokenizer, settings = tokenizer_files(end)
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    (draft / "tokenizer_config.json").write_text(json.dumps(settings))
    (draft / "config.json").write_text(json.dumps(CONFIG | changes))

    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**read_config(draft)), draft)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.15)
    model.save_pretrained(folder)
    shutil.rmtree(draft)
    return folder
