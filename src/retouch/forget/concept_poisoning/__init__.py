"""Concept poisoning: find what ties a class to a model, replace it in the training samples, relabel them, fine-tune.

Images. A post-hoc concept bottleneck (concept vectors v_k, margins p_k(x) = (v_k . e(x) + b_k) / |v_k|, class scores
W p + c) says which concepts speak for the class. In every image of the class the place of its top concept is covered
by a patch that shows a concept of a donor class, and the image is given the donor's label. Then the model is
fine-tuned on all retained data and these images.

Language models. Integrated gradients of F = sum of log p(answer token | before) say which words of an answer carry
it; the answers of the topic to forget are poisoned by masking those words, and the model is fine-tuned on them
(LoRA).

Use it to remove a whole class when only the last layer may be trained, or a topic from a language model. Know what
does the forgetting: by the authors' own later record, relabelling alone (mode "none", labels "targeted") forgets as
well; covering the concept alone (labels "keep") forgets nothing; covering changes what the remaining model says of
such images. The donor class absorbs the forgotten one, a trace that an auditor sees, and some epochs on returned data
bring the class back.

Paper: arXiv 2405.15662. Code: ChangWenhan/Concept_Inference_Unlearn_official; concept vectors and bottleneck follow
mertyg/post-hoc-cbm, which it builds on. Where they part: the first release only flipped labels, the later one is
followed here; the code trains the last linear layer only, with the backbone frozen but its batch statistics in train
mode (`train="head"`; "all" trains everything). No rule is given for the donor: the class with the largest cosine
between rows of W is ours.

Cost: a sliding window of encoder calls for each image of the class, then `epochs` passes of fine-tuning. Limits: for
CLIP-like concept banks give `encoder` and `vectors` yourself; nothing is downloaded.
"""

from typing import Any

import torch
from torch import Tensor, nn

from retouch.core import seeds
from retouch.core.batches import in_order
from retouch.core.cards import Card
from retouch.core.data import TensorData, concat, in_memory, labels_of, subset
from retouch.core.errors import InputError, in_range, one_of, positive
from retouch.core.features import features_of
from retouch.core.loop import fit
from retouch.core.models import count_classes, device_of, head_of, own, training_only, unpack
from retouch.core.models import mode as run_mode
from retouch.forget.concept_poisoning.concepts import (
    class_concepts,
    concept_activation_vector,
    concept_bottleneck,
    concept_margins,
    nearest_class,
    rank_concepts,
)
from retouch.forget.concept_poisoning.language import (
    answer_attributions,
    forget_topic,
    mask_words,
    rank_words,
    sensitive_words,
    word_scores,
)
from retouch.forget.concept_poisoning.patches import locate_concept, locate_concepts, paste_patch, poison_class

__all__ = [
    "CARD",
    "answer_attributions",
    "class_concepts",
    "concept_activation_vector",
    "concept_bottleneck",
    "concept_margins",
    "concept_poisoning",
    "forget_class",
    "forget_topic",
    "locate_concept",
    "locate_concepts",
    "mask_words",
    "nearest_class",
    "paste_patch",
    "poison_class",
    "rank_concepts",
    "rank_words",
    "sensitive_words",
    "word_scores",
]

CARD = Card(
    title="Concept poisoning",
    room="forget",
    paper="arXiv:2405.15662",
    shape="model edit",
    plugin="forget_class",
    line="Covers the concepts that carry a class or topic, relabels those samples, and fine-tunes on them.",
    tags=("classification", "language models", "concepts", "data poisoning", "fine-tuning"),
)

LABELS = ("targeted", "random", "keep")


def concept_poisoning(
    model: nn.Module,
    dataset: Any,
    target_class: int,
    *,
    donor_class: int,
    poisoned: Tensor,
    labels: str = "targeted",
    train: str = "head",
    lr: float = 1e-3,
    momentum: float = 0.9,
    batch_size: int = 32,
    epochs: int = 20,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Fine-tune on all retained data and the poisoned images of the class.

    Args:
        model: classifier with a linear head.
        dataset: training data, (image, class id).
        target_class: class to forget.
        donor_class: class whose label the poisoned images get.
        poisoned: images of the class after `poison_class` (n, c, h, w), in the data's order.
        labels: "targeted" gives them the donor's label, "random" any class's (the true one included) drawn once,
            "keep" their own.
        train: "head" trains the last linear layer only; "all" everything.
        lr: learning rate of SGD.
        momentum: of SGD.
        batch_size: samples a batch.
        epochs: passes over the data.
        seed: of orders and random labels.
        inplace: train the given model instead of a copy.
    """
    one_of("labels", labels, LABELS)
    one_of("train", train, ("head", "all"))
    positive("lr", lr)
    if donor_class == target_class:
        raise InputError(f"donor_class is {donor_class}, the class to forget, but must be another one")
    classes = labels_of(dataset)
    members = (classes == target_class).nonzero().squeeze(1)
    if len(members) == 0:
        raise InputError(f"target_class is {target_class}, but no sample of the data has this class")
    if len(poisoned) != len(members):
        raise InputError(f"poisoned holds {len(poisoned)} images, but the class has {len(members)}")
    in_range("donor_class", donor_class, 0, count_classes(model, [poisoned]) - 1)
    given = {
        "targeted": torch.full((len(members),), donor_class),
        "random": torch.randint(int(classes.max()) + 1, (len(members),), generator=seeds.generator(seed, "labels")),
        "keep": classes[members],
    }[labels]
    others = (classes != target_class).nonzero().squeeze(1)
    data = concat(TensorData(poisoned, given), subset(dataset, others))
    edited = own(model, inplace=inplace)
    head = head_of(edited) + "."
    names = [name for name, _ in edited.named_parameters() if train == "all" or name.startswith(head)]
    with training_only(edited, names):
        fit(
            edited,
            data,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum),
            seed=seed,
        )
    return edited


def forget_class(
    model: nn.Module,
    forget: Any,
    retain: Any,
    *,
    donor: int | None = None,
    mode: str = "localized",
    labels: str = "targeted",
    train: str = "head",
    patch: int | None = None,
    stride: int | None = None,
    concepts_per_class: int = 100,
    lr: float = 1e-3,
    momentum: float = 0.9,
    batch_size: int = 32,
    epochs: int = 20,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Forget one class of a classifier, with concepts found in the model's own features.

    The concept bank has one vector for each class, learned from the features before the head: the class's samples
    against as many others. The class to forget is read from the forget set.

    Args:
        model: image classifier with a linear head.
        forget: all training samples of one class.
        retain: all other training samples.
        donor: class that takes its place; the one with the most similar concepts if None.
        mode: where the donor's patch goes: localized, center, random, full or none.
        labels: label of the poisoned images: targeted, random or keep.
        train: head or all.
        patch: side of the patch; 64 of 224 pixels, in proportion, if None.
        stride: step of the search for a concept; 16 of 224 pixels, in proportion, if None.
        concepts_per_class: samples on each side that a concept vector is learned from, at least 2.
        lr: learning rate of SGD.
        momentum: of SGD.
        batch_size: samples a batch.
        epochs: passes over the data.
        seed: of concept samples, donors, places, labels and orders.
        inplace: train the given model instead of a copy.
    """
    in_range("concepts_per_class", concepts_per_class, 2)
    target = labels_of(forget).unique()
    if len(target) != 1:
        raise InputError(f"The forget set holds {len(target)} classes, but concept poisoning forgets one class")
    class_index = int(target[0])
    if bool((labels_of(retain) == class_index).any()):
        raise InputError(f"The retain set holds samples of class {class_index}, but the forget set must hold all")
    head, device = head_of(model), device_of(model)

    def encoder(images: Tensor) -> Tensor:
        return features_of(model, images.to(device), head, side="input").flatten(1)

    with run_mode(model, training=False), torch.no_grad():
        everything = concat(forget, retain)
        embeddings = torch.cat([encoder(unpack(batch)[0]) for batch in in_order(everything)]).cpu()
        classes = labels_of(everything)
        vectors, intercepts = class_concepts(embeddings, classes, count=concepts_per_class, seed=seed)
        weights, _ = concept_bottleneck(concept_margins(embeddings, vectors, intercepts), classes, seed=seed)
        donor_class = nearest_class(weights, class_index) if donor is None else donor
        if donor_class == class_index:
            raise InputError(f"donor is {donor_class}, the class to forget, but must be another one")
        donor_rows = (labels_of(retain) == donor_class).nonzero().squeeze(1)
        if len(donor_rows) == 0:
            raise InputError(f"donor is {donor_class}, but no sample of the retain set has this class")
        poisoned = poison_class(
            in_memory(forget).inputs,  # type: ignore[arg-type]
            in_memory(subset(retain, donor_rows)).inputs,  # type: ignore[arg-type]
            mode=mode,
            target_vector=vectors[rank_concepts(weights, class_index, k=1)[0]],
            donor_vector=vectors[rank_concepts(weights, donor_class, k=1)[0]],
            encoder=encoder,
            patch=patch,
            stride=stride,
            generator=seeds.generator(seed, "poison"),
        )
    return concept_poisoning(
        model,
        everything,
        class_index,
        donor_class=donor_class,
        poisoned=poisoned,
        labels=labels,
        train=train,
        lr=lr,
        momentum=momentum,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        inplace=inplace,
    )
