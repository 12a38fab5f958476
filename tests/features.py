"""What of others' adapters, checkpoints and tokenizers is done as they do it, and what is refused.

    python -m tests.features      # writes the table of docs/INTEROP.md

The sweeps of test_lora.py, test_checkpoint.py and test_tokenizer.py hold each value here against
PEFT, transformers and tokenizers; a field that these have and no list names must be refused."""
from pathlib import Path

from tests.helpers import LLAMA3_ROPE

INTEROP = Path(__file__).resolve().parent.parent / "docs" / "INTEROP.md"
BEGIN, END = "<!-- tests/features.py writes this -->\n", "<!-- end -->\n"

# {field: values that are not its default}. Fields of PEFT's LoraConfig.
ADAPTER_DONE = {
    "r": [3], "lora_alpha": [5, 3.5], "use_rslora": [True], "lora_dropout": [0.3],
    "target_modules": [["self_attn.q_proj"], ["model.layers.1.mlp.up_proj"], ["q_proj", "absent"],
                       "all-linear"],
    "exclude_modules": [["model.layers.0.self_attn.q_proj"], ["down_proj"]],
    "layers_to_transform": [[1], 0, [0, 2], []], "layers_pattern": ["layers"],
    "init_lora_weights": [False, "gaussian", "orthogonal"], "inference_mode": [True],
    "auto_mapping": [{"a": "b"}], "base_model_name_or_path": ["elsewhere"], "revision": ["main"],
    "peft_version": ["0.1"], "megatron_core": ["x"], "qalora_group_size": [8]}
ADAPTER_REFUSED = {
    "task_type": ["FEATURE_EXTRACTION"], "bias": ["all", "lora_only"],
    "peft_type": ["IA3", "ADALORA"], "target_modules": [r".*\.(q|k)_proj"],
    "exclude_modules": [r".*layers\.2.*"], "layers_pattern": [["h"]],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "mica", "lora_ga"],
    "modules_to_save": [["norm"], ["lm_head"]], "rank_pattern": [{"q_proj": 2}],
    "alpha_pattern": [{"q_proj": 2}], "trainable_token_indices": [[0], [1, 2]],
    "use_dora": [True], "alora_invocation_tokens": [[0]], "use_qalora": [True],
    "layer_replication": [[[0, 2], [1, 3]]], "lora_bias": [True], "fan_in_fan_out": [True],
    "target_parameters": [["q_proj.weight"]], "ensure_weight_tying": [True]}

# Fields of transformers' configs. The first are those that other files have, too.
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
CONFIG_DONE = {
    "rope_parameters": [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 5000.0}],
    "rope_scaling": [LLAMA3_ROPE, None], "rope_theta": [5000.0], "partial_rotary_factor": [1.0],
    "vocab_size": [352], "hidden_size": [96], "intermediate_size": [80], "num_hidden_layers": [2],
    "num_attention_heads": [8], "num_key_value_heads": [1], "head_dim": [32],
    "max_position_embeddings": [64], "rms_norm_eps": [1e-3], "tie_word_embeddings": [True],
    "layer_types": [["full_attention"] * 3], "max_window_layers": [1], "sliding_window": [4],
    "initializer_range": [0.5], "use_cache": [False], "pad_token_id": [3], "bos_token_id": [5],
    "eos_token_id": [7, [7, 8]], "pretraining_tp": [2], "dtype": ["float16"],
    "torch_dtype": ["bfloat16"], "output_hidden_states": [True], "output_attentions": [True],
    "return_dict": [True], "id2label": [{"0": "a"}], "label2id": [{"a": 0}],
    "problem_type": ["regression"], "transformers_version": ["4.40.0"], "_name_or_path": ["x"],
    "quantization_config": [None], "is_causal": [True], "architectures": [None, []]}
CONFIG_REFUSED = {
    "rope_parameters": [LINEAR, YARN, LLAMA3_ROPE | {"partial_rotary_factor": 0.5}],
    "rope_scaling": [LINEAR, YARN, {"type": "dynamic", "factor": 2.0}], "hidden_act": ["gelu"],
    "original_max_position_embeddings": [32], "partial_rotary_factor": [0.5], "is_causal": [False],
    "architectures": [["MistralForCausalLM"], ["LlamaModel"]], "attention_bias": [True],
    "mlp_bias": [True], "use_sliding_window": [True], "attention_dropout": [0.1],
    "layer_types": [["full_attention", "sliding_attention", "full_attention"]],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}], "is_encoder_decoder": [True],
    "chunk_size_feed_forward": [2], "return_dict": [False],
    "per_layer_config": [{"1": {"intermediate_size": 8}}],
    "transformers_weights": ["other.safetensors"], "auto_map": [{"AutoModelForCausalLM": "x.Y"}]}

# Steps of tokenizers by the part of a tokenizer.json that they stand in, as Python makes them; of
# other parts, what is changed. BYTES is ByteLevel(add_prefix_space=False, use_regex=False).
STEPS_DONE = {
    "normalizers": ["NFC()"], "decoders": ["ByteLevel()"],
    "pre_tokenizers": ["ByteLevel(add_prefix_space=False)",
                       "Sequence([Digits(True), ByteLevel(False)])",
                       "Sequence([Split(Regex(LLAMA3), 'isolated'), BYTES])",
                       "Sequence([Split(Regex(QWEN2), 'isolated'), BYTES])"],
    "processors": ["ByteLevel()", "Template('$A')", "Template('<s> $A')", "Template('$A </s>')",
                   "Template('<s> $A </s>')", "Sequence([ByteLevel(), Template('<s> $A')])"],
    "model": [{"fuse_unk": True}, {"dropout": 0.0}, {"ignore_merges": True}],
    "added token": [{"special": True, "lstrip": True}, {"content": " the"}, {"normalized": True},
                    {"content": "<s"}, {"content": "日本 x"}]}
STEPS_REFUSED = {
    "normalizers": ["NFD()", "NFKC()", "NFKD()", "Lowercase()", "Nmt()", "Strip()", "ByteLevel()",
                    "StripAccents()", "BertNormalizer()", "Prepend('x')", "Replace('a', 'b')",
                    "Sequence([Lowercase(), NFC()])"],
    "pre_tokenizers": [
        "ByteLevel()", "BYTES", "Digits(True)", "Split('a', 'isolated')", "Metaspace()",
        "Sequence([Digits(False), ByteLevel(False)])", "Sequence([Digits(True), ByteLevel(True)])",
        "Sequence([Split(Regex(LLAMA3), 'removed'), BYTES])", "WhitespaceSplit()", "Whitespace()",
        "Sequence([Split(Regex(LLAMA3), 'isolated', invert=True), BYTES])", "BertPreTokenizer()",
        "Sequence([Split(Regex('[a-z]'), 'isolated'), BYTES])", "CharDelimiterSplit('a')",
        "Punctuation()", "UnicodeScripts()", "FixedLength(5)"],
    "decoders": ["BPEDecoder()", "ByteFallback()", "CTC()", "Fuse()", "Metaspace()", "WordPiece()",
                 "Strip()", "Replace('a', 'b')", "Sequence([ByteLevel(), Fuse()])"],
    "processors": ["BertProcessing(('</s>', 1), ('<s>', 0))", "Template('$A <s>')",
                   "RobertaProcessing(('</s>', 1), ('<s>', 0))", "Template('<s> <s> $A')",
                   "Template('<s> $A $A')"],
    "model": [{"dropout": 0.5}, {"unk_token": "<s>"}, {"continuing_subword_prefix": "##"},
              {"end_of_word_suffix": "</w>"}, {"byte_fallback": True}, {"type": "WordPiece"},
              {"type": "WordLevel"}, {"type": "Unigram"}],
    "added token": [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"id": 5000},
                    {"content": "th"}],
    "truncation, padding": [
        {"truncation": {"max_length": 3, "stride": 0, "strategy": "LongestFirst",
                        "direction": "Right"}},
        {"padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                     "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}}]}


def pairs_of(fields):
    """(field, value) of each value of {field: values}."""
    return [(field, value) for field, values in fields.items() for value in values]


def cell(values):
    """Some values as a cell of a table; long ones are cut."""
    shown = [str(value).replace("|", "\\|") for value in values]
    return ", ".join(f"`{text[:60]}...`" if len(text) > 60 else f"`{text}`" for text in shown)


def table():
    """What docs/INTEROP.md says: fields that are only done, those that are only refused, and rows
    of those that are both."""
    lines = []
    for name, done, refused in [("Adapters", ADAPTER_DONE, ADAPTER_REFUSED),
                                ("Checkpoints", CONFIG_DONE, CONFIG_REFUSED),
                                ("Tokenizers", STEPS_DONE, STEPS_REFUSED)]:
        lines += ["", f"**{name}**", "", "| field | done, or without effect | refused |",
                  "|---|---|---|"]
        for field in sorted(done.keys() & refused.keys()):
            lines.append(f"| {field} | {cell(done[field])} | {cell(refused[field])} |")
        for heading, only in [("| all that it says | |", done.keys() - refused.keys()),
                              ("| nothing, or the default | all else |",
                               refused.keys() - done.keys())]:
            if only:
                lines.append(f"| {', '.join(sorted(only))} {heading}")
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    before, rest = INTEROP.read_text().split(BEGIN)
    INTEROP.write_text(before + BEGIN + table() + END + rest.split(END)[1])
