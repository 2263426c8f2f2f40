"""timm classifiers in mmengine: model, data set, transforms, metric."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.structures import BaseDataElement
from PIL import Image

from psaq_mm.classification import TimmClassifier
from psaq_mm.errors import UserError

from .conftest import ROOT

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='psaq_mm.PackClassificationInputs')]


@pytest.fixture
def folder(tmp_path):
    """Three classes with one to three images of 40 x 30 whose red channel is the class."""
    for label, name in enumerate(('cat', 'dog', 'owl')):
        (tmp_path / 'val' / name).mkdir(parents=True)
        for index in range(label + 1):
            pixels = np.full((30, 40, 3), (label, 100, 200), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'val' / name / f'{index}.png')
    return tmp_path


def folder_of(root, **kwargs):
    return DATASETS.build(dict(type='psaq_mm.ImageFolder', data_root=str(root), data_prefix=dict(img_path='val'),
                               pipeline=PIPELINE, test_mode=True, **kwargs))


def test_folders_are_classes(folder):
    dataset = folder_of(folder)
    assert dataset.metainfo['classes'] == ('cat', 'dog', 'owl')
    items = [dataset[i] for i in range(len(dataset))]
    assert [i['data_samples'].gt_label for i in items] == [0, 1, 1, 2, 2, 2]
    for item in items:
        assert item['inputs'].shape == (3, 30, 40) and item['inputs'].dtype == torch.uint8
        assert item['inputs'][:, 0, 0].tolist() == [200, 100, item['data_samples'].gt_label]  # files load as BGR


def test_a_list_of_files_and_labels(folder):
    (folder / 'val.txt').write_text('owl/2.png 2\ncat/0.png 0\n\n')
    dataset = folder_of(folder, ann_file='val.txt')
    assert [dataset[i]['data_samples'].gt_label for i in range(len(dataset))] == [2, 0]
    assert dataset[0]['inputs'][2, 0, 0] == 2
    (folder / 'val.txt').write_text('owl/2.png two\n')
    with pytest.raises(UserError, match="val.txt, line 1: 'owl/2.png two' is not 'FILE CLASS_INDEX'"):
        folder_of(folder, ann_file='val.txt')


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match='nowhere/val does not exist'):
        folder_of('nowhere')
    (tmp_path / 'empty' / 'val').mkdir(parents=True)
    with pytest.raises(UserError, match='no images .* in class folders of .*empty/val'):
        folder_of(tmp_path / 'empty')


def test_labels_that_cannot_be_the_models_are_found(folder):
    folder_of(folder).check(3)
    with pytest.raises(UserError, match='labels up to 2, the model has 2 classes'):
        folder_of(folder).check(2)
    with pytest.raises(UserError, match='3 class folders, the model has 1000 classes.*ann_file'):
        folder_of(folder).check(1000)
    (folder / 'val.txt').write_text('owl/2.png 20\n')
    folder_of(folder, ann_file='val.txt').check(1000)
    (folder / 'val.txt').write_text('owl/2.png 2\nowl/7.png 2\n')
    with pytest.raises(UserError, match=r'val.txt: .*owl/7.png \(1 of 2 images\) does not exist'):
        folder_of(folder, ann_file='val.txt')
    with pytest.raises(UserError, match='list .*none.txt does not exist'):
        folder_of(folder, ann_file='none.txt')
    with pytest.raises(UserError, match="class 'bat' of metainfo has no folder"):
        folder_of(folder, metainfo=dict(classes=('bat', 'cat')))


def test_resize_edge_is_pillows_bicubic():
    resize = TRANSFORMS.build(dict(type='psaq_mm.ResizeEdge', scale=20))
    pixels = np.random.default_rng(0).integers(0, 256, (33, 70, 3), dtype=np.uint8)
    out = resize(dict(img=pixels))
    assert out['img'].shape == (20, 42, 3) and out['img_shape'] == (20, 42)
    expected = np.asarray(Image.fromarray(pixels).resize((42, 20), Image.Resampling.BICUBIC))
    assert np.array_equal(out['img'], expected)
    assert resize(dict(img=pixels[:20, :20]))['img'].shape == (20, 20, 3)


@pytest.mark.parametrize('size', [(375, 500), (500, 374), (333, 500), (480, 640), (683, 1024), (224, 224)])
def test_imagenet_images_are_prepared_as_timm_does(size, tmp_path):
    from timm.data import create_transform
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    pipeline = Config.fromfile(ROOT / 'configs' / '_base_' / 'imagenet.py').test_pipeline
    results = dict(img_path=str(tmp_path / 'a.png'), gt_label=0)
    for step in pipeline:
        results = TRANSFORMS.build(dict(step, _scope_='psaq_mm'))(results)
    theirs = create_transform((3, 224, 224), interpolation='bicubic', crop_pct=0.9, mean=(0, ) * 3, std=(1 / 255, ) * 3)
    rgb = results['inputs'].flip(0).float()
    assert torch.equal(rgb, theirs(Image.fromarray(pixels)).round())


@pytest.mark.parametrize('levels', [10**6, 3])  # with three levels nearly every score has its equals
def test_accuracy_against_sorting(levels):
    torch.manual_seed(0)
    scores, labels = (torch.rand(200, 10) * levels).round(), torch.randint(10, (200, ))
    metric = METRICS.build(dict(type='psaq_mm.Accuracy', topk=(1, 3)))
    metric.process(None, [dict(pred_score=s, gt_label=int(y)) for s, y in zip(scores, labels)])
    found = metric.evaluate(200)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    for k in (1, 3):
        assert found[f'accuracy/top{k}'] == pytest.approx(
            100 * (order[:, :k] == labels[:, None]).any(1).float().mean().item(), abs=1e-4)


SMALL = dict(img_size=32, embed_dim=32, depth=1, num_heads=2)


def classifier(**kwargs):
    return MODELS.build(dict(
        type='psaq_mm.TimmClassifier', model='vit_tiny_patch16_224', num_classes=4, **SMALL, **kwargs))


def test_the_three_modes():
    model = classifier().eval()
    images = torch.randn(3, 3, 32, 32)
    logits = model(images)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(model.head(model.extract_feat(images)[0]), logits)
    samples = [BaseDataElement() for _ in range(3)]
    for sample, label in zip(samples, (0, 3, 2)):
        sample.set_field(label, 'gt_label')
    predicted = model(images, samples, mode='predict')
    assert [p.pred_label for p in predicted] == logits.argmax(1).tolist()
    torch.testing.assert_close(torch.stack([p.pred_score for p in predicted]), logits.softmax(1))
    loss = model(images, samples, mode='loss')['loss']
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 2])))


def test_wrapping_changes_no_output():
    import timm
    source = timm.create_model('vit_tiny_patch16_224', num_classes=4, **SMALL).eval()
    model = classifier().eval()
    model.backbone.load_state_dict({k: v for k, v in source.state_dict().items() if not k.startswith('head.')})
    model.head.load_state_dict(source.head.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), source(images))


def test_normalisation_is_the_pretrained_weights_own():
    vit, deit = classifier().data_preprocessor, MODELS.build(
        dict(type='psaq_mm.TimmClassifier', model='deit_tiny_patch16_224', **SMALL)).data_preprocessor
    assert vit.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert deit.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert deit.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])


@pytest.mark.parametrize('options, message', [
    (dict(model='deit_tinny'), "model.model = 'deit_tinny' is no model of timm"),
    (dict(model=3), "model.model = '3' is no model of timm"),
    (dict(model='deit_tiny_patch16_224', pretrained='file.pth'), "pretrained = 'file.pth': must be True or False"),
    (dict(model='deit_tiny_patch16_224', num_classes=0), 'num_classes = 0: a classifier needs at least one class'),
    (dict(model='deit_tiny_patch16_224', colour='red'), "cannot build 'deit_tiny_patch16_224' with .*colour"),
])
def test_wrong_models_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        TimmClassifier(**options)
