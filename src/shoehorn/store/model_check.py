"""Check that the engine can serve a model as the settings say, before anything of it is downloaded or loaded."""

from __future__ import annotations

from shoehorn.config.profiles import user_options
from shoehorn.config.settings import Settings
from shoehorn.model.engine_support import require_buildable
from shoehorn.model.files import Files


def check_model(files: Files, settings: Settings, model_id: str = "") -> None:
    """Check that the engine can build a model, without code of the checkpoint unless TRUST_REMOTE_CODE.

    Args:
        model_id: of another model than MODEL_ID, such as a draft.

    Raises:
        ModelUnavailableError: it cannot, or only with that code.
        SettingsError: an invalid profile or argument.
    """
    options = {} if model_id else user_options(settings.vram_profile, settings.vllm_extra_args)
    overrides = options.get("hf-overrides")
    require_buildable(
        files, model_id or settings.model_id, trusts_code=settings.trust_remote_code,
        overrides=overrides if isinstance(overrides, dict) else {},
        own_tokenizer=bool(options.get("skip-tokenizer-init")) or options.get("tokenizer-mode", "auto") not in (
            "auto", "hf", "slow"))
