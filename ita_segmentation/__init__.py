"""The toolkit around the ITA model: data, training, evaluation, prediction, export and the `ita` command."""

__version__ = "0.2.0"

__all__ = ["__version__"]
