"""The catalogue: models and GPUs with their sources, and how a name becomes one of them."""

from __future__ import annotations

from estimator.catalog.folder import data_folder
from estimator.catalog.gpu import Gpu, find_gpu, gpus
from estimator.catalog.model import (
    Access,
    CatalogModel,
    License,
    ModelConfig,
    ModelParameters,
    find_model,
    models,
)

__all__ = [
    "Access",
    "CatalogModel",
    "Gpu",
    "License",
    "ModelConfig",
    "ModelParameters",
    "data_folder",
    "find_gpu",
    "find_model",
    "gpus",
    "models",
]
