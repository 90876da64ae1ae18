"""VoCo-LLaMA (arXiv 2406.12275) in PyTorch: transformers' LLaVA with the VoCo mask and with caches of VoCo tokens.

    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)

A single pass reads images and text together. In two stages, `compress` computes an image's VoCo tokens once, and
`generate(..., voco_cache=cache)` reads any number of texts after them; the answers are the same.
"""

import math
import os
from typing import Any

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.llama.modeling_llama import rotate_half

from .cache_voco_llava import VocoCache, image_digest
from .configuration_voco_llava import VocoLlavaConfig
from .environment_voco_llava import PAST
from .fingerprint_voco_llava import Fingerprint, fingerprint
from .layout_voco_llava import Layout, attention_mask_of, voco_layout, voco_places, voco_windows

# Names of the tensors in the files, and of the modules that they belong to. transformers applies its own table of them
# to its own classes only.
KEY_MAPPING = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^vision_tower\.": "model.vision_tower.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}


class VocoLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The whole model.

    Its inputs are the processor's: rows of token ids with padding on either side, and `pixel_values`, uint8
    [B, U, 3, H, W]: the images of each row in their order, anything in unused slots.
    """

    config_class = VocoLlavaConfig
    config: VocoLlavaConfig

    def __init__(self, config: VocoLlavaConfig):
        super().__init__(config)
        self.voco_offsets: torch.nn.Embedding | None = None
        if config.voco.get("rows", "shared") == "own":
            width = config.vocojax["model"]["decoder"]["width"]
            self.voco_offsets = torch.nn.Embedding(config.voco["num_vocos"], width)
            self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a model; arguments are those of transformers' `from_pretrained`."""
        return super().from_pretrained(*args, **{"key_mapping": KEY_MAPPING, **kwargs})

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        voco_cache: VocoCache | None = None,
        voco_units: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model. Arguments that are not named here are those of transformers' LLaVA.

        Args:
          input_ids: int [B, S].
          pixel_values: uint8 [B, U, 3, H, W].
          attention_mask: [B, S], zero for padding; or the mask [B, 1, Q, K] itself, as `generate` makes it.
          position_ids: int [B, S]; None for those of the layout.
          past_key_values: keys and values of earlier tokens, from `generate`.
          labels: int [B, S], -100 where a token is no target; token i is predicted at i - 1.
          voco_cache: VoCo tokens that were compressed before. Each row of `input_ids` then begins with one `<voco>` for
            each of them, as the processor writes it.
          voco_units: int [B, T], the units of the cache before each row's text, in their order. Unused slots come
            first and hold -1. None for all units of the cache.
          logits_to_keep: of how many of the last tokens logits are computed; 0 or None for all.
          use_cache: whether the output has the keys and values of all tokens; None for what the config says.
          cache: another name of `past_key_values`, which transformers uses from 5.24 on.

        Returns:
          transformers' output of LLaVA. Logits of `<image>` and of padding rows are as low as they can be.

        Raises:
          ValueError: the images do not fit the ids, or the mask can't be known.
          CacheError: the cache is another model's.
        """
        if kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("the layout is known from token ids only: pass input_ids in place of inputs_embeds")
        for derived in ("cache_position", "return_dict"):  # the cache says it; the output is always transformers' own
            kwargs.pop(derived, None)
        past = past_key_values if cache is None else cache
        is_first = _is_empty(past)
        prefix = _prefix_length(voco_cache, voco_units) if is_first else 0
        queries = input_ids.shape[1] - prefix
        if attention_mask is None or len(attention_mask.shape) == 2:
            attention_mask, positions = self._visibility(input_ids, attention_mask, voco_cache, queries, past)
            position_ids = positions if position_ids is None else position_ids
        if voco_cache is not None and is_first:
            past = DynamicCache() if past is None else past
            self._place(voco_cache, voco_units, input_ids, past)
        input_ids, labels = input_ids[:, prefix:], None if labels is None else labels[:, prefix:]
        position_ids = None if position_ids is None else position_ids[:, -queries:]
        outputs = super().forward(
            inputs_embeds=self._embed(input_ids, pixel_values), attention_mask=attention_mask,
            position_ids=position_ids, logits_to_keep=0 if logits_to_keep is None else logits_to_keep,
            return_dict=True, use_cache=use_cache if voco_cache is None else True, **{PAST: past}, **kwargs,
        )
        if use_cache is False:
            outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != PAST})
        outputs.logits[..., self.config.num_tokens :] = torch.finfo(outputs.logits.dtype).min
        if labels is not None:
            counted = {key: kwargs[key] for key in ("num_items_in_batch",) if key in kwargs}
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels,
                                              vocab_size=outputs.logits.shape[-1], **counted)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Answers prompts; an answer never contains `<voco>`.

        Args:
          args: see transformers' `generate`.
          kwargs: the processor's inputs, with `voco_cache` if they were made for one, and arguments of `generate`.
        """
        kwargs = {"suppress_tokens": [self.config.voco["token_id"]], **kwargs}
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def compress(self, pixel_values: torch.Tensor, batch_size: int = 64) -> VocoCache:
        """Runs each image's unit alone and keeps the keys and values of its VoCo tokens.

        Args:
          pixel_values: uint8 [..., 3, H, W] from the processor, one unit each.
          batch_size: units that run at once, at most.

        Raises:
          ValueError: the model was trained with the causal mask, or the pixels are not the processor's.
        """
        config = self.config
        self._require_voco()
        bos, *newline = config.vocojax["unit_ids"]
        unit = [bos, *[config.image_token_index] * config.image_seq_length, *newline,
                *[config.voco["token_id"]] * config.voco["num_vocos"]]
        units = pixel_values.reshape(-1, 1, *pixel_values.shape[-3:])
        parts = []
        for images in units.split(batch_size):
            ids = torch.tensor([unit] * len(images), device=self.device)
            kept = _LastTokens(config.voco["num_vocos"])
            self(input_ids=ids, pixel_values=images, past_key_values=kept, use_cache=True, logits_to_keep=1)
            parts.append([torch.stack(layers) for layers in zip(*kept.layers_kept, strict=True)])
        keys, values = (torch.cat(arrays, dim=1) for arrays in zip(*parts, strict=True))
        return VocoCache(keys, values, config.first_position, tuple(image_digest(image) for image in units[:, 0]),
                         self.fingerprint())

    def load_cache(self, path: str | os.PathLike[str]) -> VocoCache:
        """Reads a cache that this model or the same model in vocojax has made.

        Raises:
          CacheError: the file is no cache, is damaged, or is of another model.
          OSError: the file can't be read.
        """
        cache = VocoCache.load(path)
        cache.require_model(self.fingerprint(), str(path))
        return cache

    def fingerprint(self) -> Fingerprint:
        """Returns the model's fingerprint, by which its caches are recognised. It is computed when parameters changed.

        Raises:
          ValueError: the model is quantised or has adapters.
        """
        state = tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        known: tuple[object, Fingerprint] | None = getattr(self, "_known_fingerprint", None)
        if known is None or known[0] != state:
            own = self.config.vocojax
            known = state, fingerprint(self.named_parameters(), own["model"], own["unit_ids"])
            self._known_fingerprint = known
        return known[1]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the inputs of the next forward pass, with the mask and the positions of its tokens."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,  # type: ignore[arg-type]
            attention_mask=attention_mask,  # type: ignore[arg-type]
            **kwargs,
        )
        past = kwargs.get(PAST)
        is_first = _is_empty(past)
        if not is_first:
            inputs.pop("pixel_values", None)  # of the prompt, which is in the cache
        if self.config.stands_alone:
            queries = inputs["input_ids"].shape[1]
            if is_first:
                queries -= _prefix_length(kwargs.get("voco_cache"), kwargs.get("voco_units"))
            layout = self._layout(input_ids, attention_mask, kwargs.get("voco_cache"))
            inputs["attention_mask"] = self._mask(layout, queries, past)
            inputs["position_ids"] = layout.positions_BS[:, -queries:]
        return inputs

    def _visibility(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: VocoCache | None, queries: int,
        past: Cache | None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Returns the mask and the positions of the last `queries` tokens of whole rows."""
        if not self.config.stands_alone:
            if attention_mask is None:
                return None, None
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            return attention_mask, positions[:, -input_ids.shape[1] :]
        if not _is_empty(past):
            raise ValueError("after cached keys and values, the mask can't be known from the new ids alone: use "
                             "generate, or pass attention_mask [B, 1, Q, K] and position_ids")
        layout = self._layout(input_ids, attention_mask, cache)
        return self._mask(layout, queries, past), layout.positions_BS

    def _layout(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: VocoCache | None
    ) -> Layout:
        is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        is_voco = (input_ids == self.config.voco["token_id"]) & is_token
        return voco_layout(is_token, is_voco, self.config.first_position, self.config.unit_gap,
                           None if cache is None else cache.num_vocos)

    def _mask(self, layout: Layout, queries: int, past: Cache | None) -> Any:
        keys = layout.stop_BS.shape[1]
        if past is not None and past.is_compileable:  # a static cache has slots for tokens that are still to come
            name = "get_max_length" if hasattr(past, "get_max_length") else "get_max_cache_shape"  # of transformers 4
            keys = int(getattr(past, name)())
        attention = self.model.language_model.config._attn_implementation
        return attention_mask_of(layout, queries, keys, attention, self.dtype)

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Returns the embeddings [B, S, E] of the tokens, with the images' in place of `<image>`."""
        embeddings = self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_index
        per_image, found = self.config.image_seq_length, int(is_image.sum())
        if pixel_values is None:
            if found:
                raise ValueError(f"the ids have {found} tokens of images, but there are no pixel_values: pass those of "
                                 "the processor")
            return embeddings
        if pixel_values.dtype != torch.uint8 or pixel_values.ndim != 5:
            raise ValueError(f"pixel_values must be uint8 [B, U, 3, H, W], got {pixel_values.dtype} "
                             f"{list(pixel_values.shape)}: pass those of the model's processor")
        images_B1 = is_image.sum(-1, keepdim=True) // per_image
        is_used_BU = torch.arange(pixel_values.shape[1], device=images_B1.device) < images_B1
        if found == 0 or found != per_image * int(is_used_BU.sum()):
            raise ValueError(f"the ids have {found} tokens of images, {per_image} for each, but pixel_values have room "
                             f"for {pixel_values.shape[1]} images a row: pass ids and pixels of one call of the "
                             "processor")
        features = self._encode_images(pixel_values[is_used_BU.to(pixel_values.device)]).to(embeddings)
        is_voco = input_ids == self.config.voco["token_id"]
        image_V, number_V = voco_places(is_voco, is_image, per_image)
        vocos_VE = embeddings[is_voco]
        if self.config.voco.get("init", "learned") != "learned":
            vocos_VE = vocos_VE + self._window_means(features)[image_V, number_V]
        if self.voco_offsets is not None:
            vocos_VE = vocos_VE + self.voco_offsets(number_V)
        return embeddings.masked_scatter(is_voco[..., None], vocos_VE).masked_scatter(is_image[..., None], features)

    def _window_means(self, features: torch.Tensor) -> torch.Tensor:
        """Returns [U, N, E], for each VoCo token the mean of its image's vision tokens in its window."""
        per_image = self.config.image_seq_length
        windows_NP = voco_windows(self.config.voco["init"], self.config.voco["num_vocos"], math.isqrt(per_image))
        shares_NP = windows_NP.float() / windows_NP.float().sum(-1, keepdim=True)
        return shares_NP.to(features) @ features.view(-1, per_image, features.shape[-1])

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the tokens of uint8 images [U, 3, H, W] as embeddings [U * P, E]."""
        mean, std = (torch.tensor(x, device=self.device)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = ((images.to(self.device, torch.float32) / 255 - mean) / std).to(self.dtype)
        features = self.get_image_features(
            pixel_values=pixels, vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy)
        return torch.cat(list(getattr(features, "pooler_output", features)))  # versions differ in what they return

    def _place(
        self, cache: VocoCache, units_BT: torch.Tensor | None, input_ids: torch.Tensor, past: Cache
    ) -> None:
        """Puts the units of a cache into `past`, in front of each row's text.

        A unit's keys are rotated to the positions that it has alone; rotating them by t * (N + gap) more moves them to
        slot t.
        """
        self._require_voco()
        cache.require_model(self.fingerprint())
        rows, kept = input_ids.shape[0], cache.num_vocos
        if units_BT is None:
            units_BT = torch.arange(cache.num_units).expand(rows, -1)
        units_BT = units_BT.to(self.device)
        prefix = _prefix_length(cache, units_BT)
        expected_BP = (units_BT >= 0).repeat_interleave(kept, dim=1)
        is_voco = input_ids == self.config.voco["token_id"]
        if units_BT.max() >= cache.num_units or not torch.equal(is_voco[:, :prefix], expected_BP) or (
                is_voco[:, prefix:].any()):
            raise ValueError(f"the ids do not begin with the VoCo tokens of {cache}: make them with "
                             "processor(text=..., voco_cache=cache), with the same units")
        shift_BT = ((units_BT >= 0).cumsum(-1) - 1).clamp(min=0) * (kept + self.config.unit_gap)
        rotary = self.model.language_model.rotary_emb
        cos, sin = (x[:, :, None, None] for x in rotary(torch.empty(0, device=self.device), shift_BT))
        places = {"cache_position": torch.arange(prefix, device=self.device)}
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            k_BTNGD, v_BTNGD = (x.to(self.device)[units_BT.clamp(min=0)] for x in (keys, values))
            k_BTNGD = k_BTNGD.float() * cos + rotate_half(k_BTNGD.float()) * sin
            k_BGPD, v_BGPD = (x.flatten(1, 2).transpose(1, 2).to(self.dtype) for x in (k_BTNGD, v_BTNGD))
            past.update(k_BGPD, v_BGPD, layer, places)

    def _require_voco(self) -> None:
        if not self.config.stands_alone:
            raise ValueError("the model was trained with the causal mask: its text reads whole images, so there are no "
                             "caches of VoCo tokens; read images in a single pass")


def _is_empty(past: Cache | None) -> bool:
    return past is None or int(past.get_seq_length()) == 0


def _prefix_length(cache: VocoCache | None, units_BT: torch.Tensor | None) -> int:
    """Returns how many tokens of each row stand for VoCo tokens of a cache."""
    if cache is None:
        return 0
    return (cache.num_units if units_BT is None else units_BT.shape[1]) * cache.num_vocos


class _LastTokens(DynamicCache):
    """A cache that hands on a pass's keys and values, and keeps only those of its last tokens.

    Attributes:
      layers_kept: for each layer its keys and its values, [B, N, G, D].
    """

    def __init__(self, count: int):
        super().__init__()
        self._count = count
        self.layers_kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the last tokens of a layer, and returns all of them."""
        last = lambda x: x[:, :, -self._count :].transpose(1, 2).clone()
        self.layers_kept.append((last(key_states), last(value_states)))
        return key_states, value_states
