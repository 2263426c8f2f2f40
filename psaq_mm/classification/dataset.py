"""Images in folders, and the transforms that ImageNet evaluation needs beside mmcv's."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement
from PIL import Image

from ..errors import UserError
from ..registry import DATASETS, TRANSFORMS

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Labelled images, as ImageNet comes: one folder a class, or one folder and a list of files and labels.

    Args:
        data_root (str): Root folder.
        data_prefix (dict): ``img_path``: folder of the images inside the root. Defaults to the root itself.
        ann_file (str): Lines of 'file label', label being the class index; '' where folders are the classes, sorted by
            name.
        metainfo (dict, optional): ``classes``: names; in the order of the labels, or those of the folders.
        **kwargs: See mmengine's BaseDataset.
    """

    def __init__(self, data_root='', data_prefix=None, ann_file='', metainfo=None, **kwargs):
        super().__init__(ann_file=ann_file, metainfo=metainfo, data_root=data_root,
                         data_prefix=data_prefix or dict(img_path=''), **kwargs)

    def load_data_list(self):
        folder = Path(self.data_prefix['img_path'])
        found = self.listed(folder) if self.ann_file else self.in_folders(folder)
        if not found:
            raise UserError(f'ImageFolder: no images ({", ".join(SUFFIXES)}) in class folders of {folder}')
        return [dict(img_path=str(path), gt_label=label) for path, label in found]

    def listed(self, folder):
        found = []
        if not Path(self.ann_file).is_file():
            raise UserError(f'ImageFolder: the list {self.ann_file} does not exist')
        for number, line in enumerate(Path(self.ann_file).read_text().splitlines(), 1):
            name, _, label = line.strip().rpartition(' ')
            if name and label.isdigit():
                found.append((folder / name.strip(), int(label)))
            elif line.strip():
                raise UserError(f"{self.ann_file}, line {number}: {line.strip()!r} is not 'FILE CLASS_INDEX'")
        missing = [path for path, _ in found if not path.is_file()]
        if missing:
            raise UserError(f'{self.ann_file}: {missing[0]} ({len(missing)} of {len(found)} images) does not exist')
        return found

    def check(self, num_classes: int) -> None:
        """Raises a UserError if the labels cannot be those of a model with so many classes."""
        folder = self.data_prefix['img_path']
        largest = max(self.get_data_info(index)['gt_label'] for index in range(len(self)))
        if largest >= num_classes:
            raise UserError(f'ImageFolder: {folder} has labels up to {largest}, the model has {num_classes} classes')
        folders = len(self.metainfo.get('classes') or ())
        if not self.ann_file and folders != num_classes:
            raise UserError(f'ImageFolder: {folder} has {folders} class folders, the model has {num_classes} classes: '
                            'labels counted in the order of the folders would be wrong. Give dataset.ann_file, a list '
                            'of FILE CLASS_INDEX')

    def in_folders(self, folder):
        if not folder.is_dir():
            raise UserError(f'ImageFolder: the folder {folder} does not exist')
        folders = sorted(p.name for p in folder.iterdir() if p.is_dir())
        classes = self.metainfo.get('classes') or folders
        missing = [name for name in classes if name not in folders]
        if missing:
            raise UserError(f"ImageFolder: class '{missing[0]}' of metainfo has no folder in {folder}")
        self._metainfo['classes'] = tuple(classes)
        return [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob('*'))
                if path.suffix.lower() in SUFFIXES]


@TRANSFORMS.register_module()
class ResizeEdge(BaseTransform):
    """Resizes so that the shorter side has a given length, bicubic with antialiasing (Pillow), as ImageNet models are
    evaluated: the longer side is rounded down, as torchvision does.

    Args:
        scale (int): Length in pixels.
    """

    def __init__(self, scale):
        self.scale = scale

    def transform(self, results):
        height, width = results['img'].shape[:2]
        short = min(height, width)
        size = self.scale * width // short, self.scale * height // short
        if size != (width, height):
            results['img'] = np.asarray(Image.fromarray(results['img']).resize(size, Image.Resampling.BICUBIC))
        results['img_shape'] = results['img'].shape[:2]
        return results


@TRANSFORMS.register_module()
class PackClassificationInputs(BaseTransform):
    """The image as a tensor (3, H, W) uint8 in ``inputs``, label and path in ``data_samples``."""

    def transform(self, results):
        image = torch.from_numpy(np.ascontiguousarray(results['img'].transpose(2, 0, 1)))
        sample = BaseDataElement(metainfo=dict(img_path=results['img_path'], img_shape=results['img'].shape[:2]))
        sample.set_field(results['gt_label'], 'gt_label')
        return dict(inputs=image, data_samples=sample)
