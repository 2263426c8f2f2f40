"""timm classifiers as mmengine models, with what evaluates them: data set, transforms, top-k accuracy."""
from .classifier import Classifier, TimmClassifier
from .dataset import ImageFolder, PackClassificationInputs, ResizeEdge
from .metric import Accuracy

__all__ = ['Accuracy', 'Classifier', 'ImageFolder', 'PackClassificationInputs', 'ResizeEdge', 'TimmClassifier']
