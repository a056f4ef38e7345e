"""From config.json to named sizes, flags and the shape of each block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.modelspec.types import AttentionLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.modelspec.rows import Family


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Everything that the table's sizes and flags refer to.

    Attributes:
        sizes: Named sizes.
        flags: Named truths.
        blocks: Number of transformer blocks.
        tied: Whether the head is the embedding.
        experts: Routed experts of a mixture block, else 0.
    """

    sizes: Mapping[str, int]
    flags: Mapping[str, bool]
    blocks: int
    tied: bool
    experts: int

    def size(self, expression: str) -> int:
        """Return the value of names and numbers joined by "+"."""
        return sum(
            int(part) if part.isdigit() else self.sizes[part] for part in expression.split("+")
        )

    def flag(self, name: str) -> bool:
        """Return the truth of a flag; "yes" is true, "" false, "!" negates."""
        if name in ("", "yes"):
            return name == "yes"
        if name.startswith("!"):
            return not self.flag(name[1:])
        return self.flags.get(name, False)


class _Config:
    """Reads a config with a family's names; integers are checked, all offenders collected."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family
        self.wrong: list[str] = []

    def integer(self, key: str, default: int = 0) -> int:
        key = self.family.keys.get(key, key)
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.wrong.append(f"{key}={value!r}")
            return default
        return value

    def truth(self, key: str, default: bool = False) -> bool:
        return bool(self.config.get(key, default))


def read_dimensions(config: Mapping[str, Any], family: Family, where: str) -> Dimensions:
    """Compute the sizes and flags of a model.

    Args:
        config: The language model's part of config.json.
        family: Its row of the table.
        where: Name of the file or catalogue entry, for messages.

    Raises:
        InputError: Keys are missing (all are listed) or are not sizes.
    """
    if config.get("num_experts") is None and "num_local_experts" in config:
        # transformers 5 writes the number under Mixtral's name, whatever the model's own was.
        config = {**config, "num_experts": config["num_local_experts"]}
    missing = [key for key in family.required if config.get(key) is None]
    if missing:
        raise InputError(
            f"{where} lacks {', '.join(missing)}, which {family.architectures[0]} needs. "
            "Take the config.json that the model's authors published."
        )
    reader = _Config(config, family)
    sizes = _sizes(reader)
    blocks = reader.integer("num_hidden_layers")
    wrong = [*reader.wrong]
    wrong += [
        f"{key}={config[key]!r}"
        for key in family.required
        if config[key] == 0 and not any(item.startswith(f"{key}=") for item in wrong)
    ]
    if wrong:
        raise InputError(f"{where}: sizes must be positive integers, but got {', '.join(wrong)}.")
    if sizes["heads"] % max(1, sizes["kv_heads"]):
        raise InputError(
            f"{where}: num_key_value_heads must divide num_attention_heads, "
            f"but got {sizes['kv_heads']} and {sizes['heads']}."
        )
    return Dimensions(
        sizes=sizes,
        flags=_flags(reader, sizes),
        blocks=blocks,
        tied=reader.truth("tie_word_embeddings", family.tied),
        experts=sizes["experts"],
    )


def _sizes(reader: _Config) -> dict[str, int]:
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    head = reader.integer("head_dim") or hidden // max(1, heads)
    kv_heads = _kv_heads(reader, heads)
    nope, rope = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    value = reader.integer("v_head_dim")
    latent = reader.integer("kv_lora_rank") > 0
    expert = reader.integer("moe_intermediate_size")
    shared = reader.integer("shared_expert_intermediate_size")
    return {
        "one": 1,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head": head,
        "queries": heads * (nope + rope) if latent else heads * head,
        "keys": kv_heads * head,
        "values": kv_heads * head,
        "intermediate": reader.integer("intermediate_size") or 4 * hidden,
        "vocabulary": reader.integer("vocab_size"),
        "embedding": reader.integer("word_embed_proj_dim") or hidden,
        "positions": reader.integer("max_position_embeddings"),
        "experts": reader.integer("num_experts"),
        "expert": expert,
        "shared": shared or expert * reader.integer("n_shared_experts"),
        "q_lora": reader.integer("q_lora_rank"),
        "kv_lora": reader.integer("kv_lora_rank"),
        "rope": rope,
        "latent_heads": heads * (nope + value),
        "latent_values": heads * value,
    }


def _kv_heads(reader: _Config, heads: int) -> int:
    if reader.family.architectures[0] == "FalconForCausalLM":
        if reader.truth("new_decoder_architecture"):
            return reader.integer("num_kv_heads") or heads
        return 1 if reader.truth("multi_query", True) else heads
    return (reader.integer("num_key_value_heads") if reader.family.grouped else 0) or heads


def _flags(reader: _Config, sizes: Mapping[str, int]) -> dict[str, bool]:
    config = reader.config
    flags = {key: bool(value) for key, value in config.items() if isinstance(value, (bool, int))}
    for key, default in reader.family.flags.items():
        flags.setdefault(key, default)
    new_falcon = reader.truth("new_decoder_architecture")
    two_norms = new_falcon and config.get("num_ln_in_parallel_attn") != 1
    sequential = not new_falcon and not reader.truth("parallel_attn", True)
    return flags | {
        "has_attention": True,
        "has_mlp": True,
        "projected": sizes["embedding"] != sizes["hidden"],
        "do_layer_norm_before": flags.get("do_layer_norm_before", True)
        and not reader.truth("_remove_final_layer_norm"),
        "pre_norm": flags.get("do_layer_norm_before", True),
        "relu": config.get("activation_function") in (None, "relu"),
        "two_norms": two_norms,
        "sequential": sequential,
        # Attention and feed-forward part of a Falcon block read the same normalised input.
        "one_norm": not two_norms and not sequential,
        "full_heads": sizes["kv_heads"] == sizes["heads"],
        "corrected": config.get("topk_method") == "noaux_tc",
    }


def is_mixture_block(config: Mapping[str, Any], family: Family, experts: int, block: int) -> bool:
    """Return whether a block's feed-forward part is a mixture of experts."""
    if not experts or not family.moe:
        return False
    if not family.mlp:
        return True
    if block in (config.get("mlp_only_layers") or ()):
        return False
    first_dense = config.get("first_k_dense_replace") or 0
    frequency = config.get("moe_layer_freq") or 1
    step = config.get("decoder_sparse_step") or 1
    return bool(block >= first_dense and block % frequency == 0 and (block + 1) % step == 0)


def in_block(config: Mapping[str, Any], dimensions: Dimensions, block: int) -> Dimensions:
    """Return the sizes of one block, which ``block_configs`` (Nemotron's DeciLM) may change.

    A part that the architecture search took out is left without its flag (``has_attention``,
    ``has_mlp``).
    """
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or block >= len(blocks):
        return dimensions
    sizes, flags = dict(dimensions.sizes), dict(dimensions.flags)
    attention, mlp = blocks[block].get("attention") or {}, blocks[block].get("ffn") or {}
    flags["has_attention"] = not (attention.get("no_op") or attention.get("replace_with_linear"))
    flags["has_mlp"] = not (mlp.get("no_op") or mlp.get("replace_with_linear"))
    if sharing := attention.get("n_heads_in_group"):
        sizes["kv_heads"] = sizes["heads"] // sharing
        sizes["keys"] = sizes["values"] = sizes["kv_heads"] * sizes["head"]
    if multiple := mlp.get("ffn_mult"):
        # Two thirds of the multiple, rounded up to 256, as for every gated feed-forward part.
        width = int(2 * multiple * sizes["hidden"] / 3)
        sizes["intermediate"] = -(-width // 256) * 256
    return replace(dimensions, sizes=sizes, flags=flags)


def attention_layers(
    config: Mapping[str, Any], family: Family, dimensions: Dimensions
) -> tuple[AttentionLayer, ...]:
    """Return what each block caches per token, with its sliding window."""
    sizes = dimensions.sizes
    if sizes["kv_lora"]:
        layer = AttentionLayer(
            sizes["kv_lora"] + sizes["rope"],
            None,
            1,
            is_latent=True,
            expanded_elements=sizes["queries"] + sizes["latent_values"],
        )
        return (layer,) * dimensions.blocks
    windows = _windows(config, family, dimensions.blocks)
    layers = []
    for block, window in enumerate(windows):
        own = in_block(config, dimensions, block)
        if own.flag("has_attention"):
            elements = own.sizes["keys"] + own.sizes["values"]
            layers.append(AttentionLayer(elements, window, own.sizes["kv_heads"]))
    return tuple(layers)


def _windows(config: Mapping[str, Any], family: Family, blocks: int) -> list[int | None]:
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return [None] * blocks
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == blocks:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    name = family.architectures[0]
    if name.startswith(("Gemma2", "GptOss")):  # every other block, the first one slides
        return [None if block % 2 else window for block in range(blocks)]
    if name.startswith("Gemma3"):
        period = config.get("sliding_window_pattern") or 6
        return [None if (block + 1) % period == 0 else window for block in range(blocks)]
    if name.startswith("Qwen"):
        full = config.get("max_window_layers") or blocks
        slides = config.get("use_sliding_window") is True
        return [window if slides and block >= full else None for block in range(blocks)]
    return [window] * blocks
