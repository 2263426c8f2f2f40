"""What the demos' models predict, in full precision and quantized, one above the other."""
import numpy as np
from PIL import Image


def draw(task, full, quantized, data, out):
    """Writes a picture: each image with full-precision predictions above, quantized ones below.

    Args:
        task (str): detection, segmentation or classification.
        full, quantized (tuple): Config and checkpoint.
        data (Path): Folder of the rendered images.
        out (Path): File to write.
    """
    from psaq_mm.engine.hooks import grid
    rows, columns = zip(*(globals()[f'draw_{task}'](*model, data) for model in (full, quantized)))
    Image.fromarray(grid([picture for row in rows for picture in row], columns=columns[0])).save(out)


def scenes_of(data):
    return sorted((data / 'val').glob('*.png'))[:4]


def draw_detection(config, checkpoint, data):
    """Scenes with boxes and masks of what scores above 0.5."""
    import mmcv
    import torch
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS
    model = init_detector(config, str(checkpoint), device='cpu')
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name=f'demo_{id(model)}'))
    visualizer.dataset_meta = model.dataset_meta
    pictures = []
    for path in scenes_of(data):
        image = mmcv.imrescale(mmcv.imread(str(path), channel_order='rgb'), 2.0)
        result = inference_detector(model, mmcv.imread(str(path)))
        instances = result.pred_instances[result.pred_instances.scores > 0.5].cpu()
        instances.bboxes *= 2
        instances.masks = torch.nn.functional.interpolate(
            instances.masks[None].float(), size=image.shape[:2], mode='nearest')[0].bool() if len(instances) else \
            torch.zeros(0, *image.shape[:2], dtype=torch.bool)
        result.pred_instances = instances
        visualizer.add_datasample('demo', image, result, draw_gt=False, pred_score_thr=0.5)
        pictures.append(np.asarray(visualizer.get_image()))
    return pictures, len(pictures)


def draw_segmentation(config, checkpoint, data):
    """Scenes under the predicted semantic map."""
    import mmcv
    from mmseg.apis import inference_model, init_model
    from mmseg.registry import VISUALIZERS
    model = init_model(config, str(checkpoint), device='cpu')
    visualizer = VISUALIZERS.build(dict(type='SegLocalVisualizer', name=f'demo_{id(model)}', alpha=0.6))
    visualizer.dataset_meta = model.dataset_meta
    pictures = []
    for path in scenes_of(data):
        image = mmcv.imread(str(path), channel_order='rgb')
        result = inference_model(model, mmcv.imread(str(path)))
        visualizer.add_datasample('demo', image, result, draw_gt=False, with_labels=False)
        pictures.append(np.asarray(mmcv.imrescale(visualizer.get_image(), 2.0)))
    return pictures, len(pictures)


def draw_classification(config, checkpoint, data):
    """Objects with the class that scores highest, and its score."""
    import cv2
    import mmcv
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import load_checkpoint
    cfg = Config.fromfile(config) if isinstance(config, str) else config
    init_default_scope('psaq_mm')
    model = MODELS.build(cfg.model).eval()
    classes = load_checkpoint(model, str(checkpoint), map_location='cpu')['meta']['dataset_meta']['classes']
    files = [p for name in classes for p in sorted((data / 'objects' / 'val' / name).glob('*.png'))[:2]]
    pictures = []
    for path in files:
        image = mmcv.imread(str(path))
        inputs = model.data_preprocessor(dict(inputs=[torch.from_numpy(image.transpose(2, 0, 1).copy())]))['inputs']
        with torch.no_grad():
            score, label = model(inputs)[0].softmax(0).max(0)
        picture = mmcv.imrescale(image[..., ::-1], 1.5)
        picture = cv2.copyMakeBorder(picture, 0, 20, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        cv2.putText(picture, f'{classes[int(label)]} {score:.2f}', (4, picture.shape[0] - 6),
                    cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        pictures.append(picture)
    return pictures, len(pictures)
