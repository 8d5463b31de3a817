"""Configuration of ITA. Defined in `modeling_ita/`, which every checkpoint carries."""

from modeling_ita.configuration_ita import VILD_TEMPLATES, ITAConfig

__all__ = ["VILD_TEMPLATES", "ITAConfig"]
