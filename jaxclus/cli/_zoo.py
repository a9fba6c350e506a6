"""`jaxclus zoo`."""

import dataclasses

import tyro

from jaxclus import zoo


@dataclasses.dataclass(frozen=True)
class Zoo:
    """The networks that ship with the library, with their figures; --verify measures them again.

    Try:
      jaxclus zoo
      jaxclus zoo cifar10-resnet8-pgd
      jaxclus zoo --verify
      jaxclus zoo fashion_mnist-cnn-pgd --verify --num-images 100
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Networks; default all."""
    verify: bool = False
    """Measure every figure from the shipped weights and compare it with the model card."""
    num_images: int | None = None
    """With --verify: attack the first so many images only; default as many as on the card."""

    def run(self) -> None:
        """Prints the cards, or compares them with what is measured now."""
        if self.num_images is not None and not self.verify:
            raise ValueError(f"`num_images` is a setting of --verify, got {self.num_images}")
        names = self.names or tuple(zoo.list())
        cards = [zoo.card(name) for name in names]
        if self.verify:
            self._verify(names)
            return
        for card in cards:
            print(_described(card))

    def _verify(self, names: tuple[str, ...]) -> None:
        wrong = []
        for name in names:
            wanted, found = zoo.remeasure(name, self.num_images)
            fields = [field.name for field in dataclasses.fields(wanted)]
            differing = [f for f in fields if getattr(wanted, f) != getattr(found, f)]
            print(f"{name}: {_accuracies(found)}: {'DIFFERS' if differing else 'as on its card'}")
            for field in differing:
                wrong.append(f"{name}: {field}")
                print(f"  {field}: {_difference(getattr(wanted, field), getattr(found, field))}")
        if wrong:
            raise ValueError(f"figures differ from the model cards: {', '.join(wrong)}")


def _difference(wanted: float | str, found: float | str) -> str:
    """Two figures, or the numbers of the images that have other verdicts."""
    if isinstance(wanted, str) and isinstance(found, str):
        pairs = enumerate(zip(wanted, found, strict=True))
        return f"other for image {', '.join(str(i) for i, (a, b) in pairs if a != b)}"
    return f"{wanted} on the card, {found} here"


def _accuracies(figures: zoo.Figures) -> str:
    return (
        f"clean {figures.clean_accuracy:.2%} ({figures.clean_images} images), "
        f"PGD-20 {figures.pgd_accuracy:.2%}, AutoAttack {figures.autoattack_accuracy:.2%} "
        f"(first {figures.attacked_images})"
    )


def _described(card: zoo.ModelCard) -> str:
    size = card.path.stat().st_size / 2**20
    return (
        f"{card.name} ({size:.2f} MiB)\n"
        f"  {card.note}\n"
        f"  {card.objective}, {card.training['epochs']} epochs of {card.training_images} images, "
        f"{card.augmentation}, seed {card.seed}\n"
        f"  {card.norm} eps {card.eps:.4g}: {_accuracies(card.figures)}\n"
        f"  clustering: within - between {card.figures.within_minus_between:.3f}, "
        f"adjusted Rand index {card.figures.adjusted_rand:.2f}"
    )
