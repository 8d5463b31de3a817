"""Image processor of ITA. Defined in `modeling_ita/`, which every checkpoint carries."""

from modeling_ita.image_processing_ita import ITAImageProcessor

__all__ = ["ITAImageProcessor"]
