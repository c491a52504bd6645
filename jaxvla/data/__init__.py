"""Demonstrations and statistics of data sets."""

from jaxvla.registry import Registry

DATASETS = Registry(
    "dataset",
    {
        "recorded": "jaxvla.data.recorded:RecordedEpisodes",
        "libero_hdf5": "jaxvla.data.libero_hdf5:LiberoHdf5",
        "lerobot": "jaxvla.data.lerobot:LeRobotDataset",
    },
)
"""Readers of demonstrations on disk: `config.finetune.dataset.kind`."""
