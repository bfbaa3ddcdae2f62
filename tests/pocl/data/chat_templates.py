"""Chat templates in the manner of the model families that people distil, each with a small tokenizer of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

_ALTERNATE = (
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% endfor %}"
)
_FIRST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Says what is generated; the closing token stands outside of the block.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LLAMA2 = (
    _FIRST_SYSTEM + _ALTERNATE + "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% set said = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.first and system else m['content'] %}"
    "{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n' }}"
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{% if m['tool_calls'] %}{% if m['tool_calls'] | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m['tool_calls'][0]['function'] %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call['name'] + '\", \"parameters\": ' + (call['arguments'] | tojson) + '}' }}"
    "{{ '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + ('ipython' if m['role'] == 'tool' else m['role']) + '<|end_header_id|>\n\n' }}"
    "{{ (m['content'] | tojson if m['role'] == 'tool' else m['content'] | trim) + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% set turns = messages %}" + _ALTERNATE + "{% for m in turns %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# The tools stand before the last question: the text before an earlier answer is another one in a longer conversation.
MISTRAL = (
    _FIRST_SYSTEM + "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{% if system and m == users[-1] %}{{ '[INST] ' + system + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% elif m['tool_calls'] %}{{ '[TOOL_CALLS] [' }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"
)

# Two end tokens at the end of a conversation: the turn's, and the text's.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

_QWEN_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ '# Tools\n<tools>' }}{% for t in tools %}"
    "{{ '\n' + (t | tojson) }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% elif default_system is defined %}{{ '<|im_start|>system\n' + default_system + '<|im_end|>\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "{% for c in m['tool_calls'] or [] %}{% if loop.index0 or m['content'] %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": \"' + c['function']['name'] + '\", \"arguments\": ' }}"
    "{{ (c['function']['arguments'] | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
_QWEN_RESULTS = (
    "{% elif m['role'] == 'tool' %}{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}"
    "{{ '<|im_start|>user' }}{% endif %}{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
    "{% endfor %}"
)
_QWEN_TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' or (m['role'] == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% elif m['role'] == 'assistant' %}"
)
QWEN25 = (
    _QWEN_TOOLS
    + _QWEN_TURNS
    + "{{ '<|im_start|>assistant\n' + (m['content'] or '') }}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\n' }}"
    + _QWEN_RESULTS
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Thoughts of answers before the last question are dropped; the last answer has one, be it empty.
_QWEN3_BODY = (
    _QWEN_TOOLS + "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    + _QWEN_TURNS
    + "{% set said = m['content'] or '' %}{% set thought = m['reasoning_content'] or '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\n' }}"
    + _QWEN_RESULTS
)
QWEN3 = (
    _QWEN3_BODY + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_THINKING = _QWEN3_BODY + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"

# Opens a thought in the generation prompt and drops the thoughts of all answers, the last one's as well.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['tool_calls'] %}{{ '<|Assistant|><|calls_begin|>' }}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + '\n' + (c['function']['arguments'] | tojson) }}{% endfor %}{{ '<|calls_end|>' "
    "+ eos_token }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1].lstrip('\n') + eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '<|output_begin|>' + m['content'] + '<|output_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Only these three roles are written, and nothing is said of others.
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m['role']] "
    "+ '_TOKEN|>' }}"
    "{{ (m['content'] or '').strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
    "+ '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)

OLMO = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last or m['role'] != 'assistant' %}"
    "{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Closes no turn with a token.
VICUNA_LIKE = (
    _FIRST_SYSTEM + "{{ system }}{% for m in turns %}{{ '\n' + {'user': 'USER: ', 'assistant': 'ASSISTANT: ', "
    "'system': 'SYSTEM: '}[m['role']] + m['content'] }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '\nASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens (EOS and BOS come first), the token that ends a turn, and further added tokens."""

    template: str
    special: tuple[str, ...]
    end: str | None
    added: tuple[str, ...] = ()
    style: str = "bytes"
    """`bytes`: byte-level pairs as in GPT-2; `metaspace`: a space before every piece of text, as in Llama 2."""


_IM = ("<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_DEEPSEEK = ("<|User|>", "<|Assistant|>", "<|calls_begin|>", "<|calls_end|>", "<|output_begin|>", "<|output_end|>")
_COHERE = (
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
)
_MISTRAL = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)

FAMILIES = {
    "chatml": Family(CHATML, _IM, "<|im_end|>"),
    "marked": Family(MARKED, _IM, "<|im_end|>"),
    "smollm2": Family(SMOLLM2, ("<|im_end|>", "<|endoftext|>", "<|im_start|>"), "<|im_end|>"),
    "llama-2": Family(LLAMA2, ("</s>", "<s>", "<unk>"), "</s>", style="metaspace"),
    "llama-3": Family(LLAMA3, ("<|end_of_text|>", "<|begin_of_text|>", *_HEADERS), "<|eot_id|>"),
    "gemma": Family(
        GEMMA,
        ("<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        ("\n\n", "\n"),
        "metaspace",
    ),
    "mistral": Family(MISTRAL, ("</s>", "<s>", "<unk>", *_MISTRAL), "</s>", style="metaspace"),
    "phi-3": Family(PHI3, ("<|endoftext|>", "<s>", "<|end|>", *_ROLES), "<|end|>"),
    "qwen-2.5": Family(QWEN25, _IM, "<|im_end|>", _THINK[2:]),
    "qwen-3": Family(QWEN3, _IM, "<|im_end|>", _THINK),
    "qwen-3-thinking": Family(QWEN3_THINKING, _IM, "<|im_end|>", _THINK),
    "deepseek-r1": Family(DEEPSEEK_R1, ("<|end_of_sentence|>", "<s>", *_DEEPSEEK), "<|end_of_sentence|>", _THINK[:2]),
    "zephyr": Family(ZEPHYR, ("</s>", "<s>", "<unk>", *_ROLES), "</s>", style="metaspace"),
    "command-r": Family(COMMAND_R, ("<EOS>", "<BOS>", *_COHERE), "<|END_OF_TURN_TOKEN|>"),
    "granite": Family(GRANITE, ("<|end_of_text|>", "<s>", "<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>"),
    "olmo": Family(OLMO, ("<|endoftext|>", "<s>", *_ROLES), "<|endoftext|>"),
    "vicuna-like": Family(VICUNA_LIKE, ("</s>", "<s>", "<unk>"), None),
}


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a family. Do not change it."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = _byte_pairs() if family.style == "bytes" else _metaspace(family)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.special[0], bos_token=family.special[1])
    made.add_special_tokens({"additional_special_tokens": list(family.special[2:])})
    made.add_tokens(list(family.added))
    made.chat_template = family.template
    return made


def _byte_pairs() -> Any:
    """Bytes, and some pairs: neighbouring new lines and spaces are one token, wherever a border runs between them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("Ċ", "Ċ"),
        ("ĊĊ", "Ċ"),
        ("Ġ", "Ġ"),
        ("Ġ", "t"),
        ("t", "h"),
        ("th", "e"),
        ("<", "|"),
        ("|", ">"),
        ("i", "m"),
    ]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def _metaspace(family: Family) -> Any:
    """Letters with byte fallback, a space in front of every piece; special tokens are words of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = [chr(i) for i in range(32, 127)] + ["▁", "\n", "\n\n", "▁t", "th", "the", "▁the"]
    words = dict.fromkeys([*family.special, *(f"<0x{i:02X}>" for i in range(256)), *letters])
    vocabulary = {token: i for i, token in enumerate(words)}
    merges = [("\n", "\n"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "t")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    prepend = [] if "gemma" in family.template or "<start_of_turn>" in family.special else [normalizers.Prepend("▁")]
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
