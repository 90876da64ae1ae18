"""The configuration of an exported VoCo-LLaMA: transformers' `LlavaConfig` with the entries that vocojax adds."""

from typing import TYPE_CHECKING, Any

from transformers import LlavaConfig

from .environment_voco_llava import PAST  # noqa: F401  # the import checks the version of transformers


class VocoLlavaConfig(LlavaConfig):
    """A `LlavaConfig` that also holds what its `config.json` says of VoCo tokens, prompts and mask.

    Attributes:
      voco: `num_vocos`, the VoCo tokens per unit; `token_id`, the id of `<voco>`; `positions`, see `unit_gap`; `init`:
        `learned`, or how the mean of each VoCo token's window is added to its embedding, see `voco_windows`; `rows`:
        `own` if each VoCo token of a unit has an offset of its own, which is added too.
      prompt: `template`, `fit` and `visibility`. `visibility` is the mask that the model was trained with: `voco`, or
        `causal` for upper bounds. Set `config.prompt["visibility"]` to evaluate with the other one.
      vocojax: `model`, the model's config in vocojax; `unit_ids`, the ids of BOS and newline in a unit.
    """

    if TYPE_CHECKING:  # some versions 5 make a dataclass of the class, in which these would be required
        voco: dict[str, Any]
        prompt: dict[str, Any]
        vocojax: dict[str, Any]

    @property
    def stands_alone(self) -> bool:
        """Whether a unit sees nothing outside itself, so that it can be compressed alone."""
        return self.prompt["visibility"] == "voco"

    @property
    def first_position(self) -> int:
        """Position of a unit's first VoCo token in the unit: the number of tokens before it."""
        return self.image_seq_length + len(self.vocojax["unit_ids"])

    @property
    def unit_gap(self) -> int:
        """Positions between the VoCo tokens of two units: none (`compact`), or those of all tokens between them."""
        return 0 if self.voco.get("positions", "compact") == "compact" else self.first_position

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary that have a token; later rows are `<image>`'s or padding, and are never predicted."""
        decoder = self.vocojax["model"]["decoder"]
        return decoder["vocab_size"] - decoder["vocab_padding"]
