"""What articles and papers claim of batch normalization, and which results answer it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from answers import (
    CONVOLUTIONS,
    Found,
    as_good,
    augmented,
    corrupted,
    costs,
    dense,
    erratic,
    from_to,
    harm,
    hits,
    nothing_lost,
    own_statistics,
    precise_is_better,
    same_cell,
    same_column,
    tested,
    thousand_images,
    unequal_seeds,
    variance,
    won_back,
)

MINDEE = "[Mindee, *Danger of Batch Normalization*](https://www.mindee.com/blog/batch-normalization)"
IRPAN = "[Irpan 2017, *On The Perils of Batch Norm*](https://www.alexirpan.com/2017/04/26/perils-batch-norm.html)"
SITES = "an article on Wu & Johnson, of several labs"
WU = "Wu & Johnson 2021, *Rethinking 'Batch' in BatchNorm*"
IOFFE = "Ioffe 2017, *Batch Renormalization*"


class Claim(NamedTuple):
    """What a source says, and how the results of a notebook answer it."""

    text: str
    source: str
    notebook: str
    answer: Callable[[dict[str, Any]], Found]


CLAIMS = (
    Claim(
        "With the running average, validation is erratic though the weights are not",
        MINDEE,
        "1_erratic_validation",
        erratic,
    ),
    Claim(
        "A network that is tested with statistics that were never estimated fails",
        MINDEE,
        "1_erratic_validation",
        tested(CONVOLUTIONS, "unestimated"),
    ),
    Claim(
        "Statistics estimated in one pass after training are better than the running average",
        MINDEE,
        "1_erratic_validation",
        tested(CONVOLUTIONS, "running"),
    ),
    Claim("The same in a deeper network", MINDEE, "1_erratic_validation", tested("ResNet-20", "running")),
    Claim(
        "Two datasets in batches of their own with one moving average lose accuracy, 2 points there, against mixed "
        "batches",
        IRPAN,
        "2_two_datasets",
        from_to(("turn-shared", "running"), ("mixed-shared", "running"), reported=2),
    ),
    Claim("Seeds differ more, too", IRPAN, "2_two_datasets", unequal_seeds),
    Claim(
        "Shared weights with statistics of each dataset are best, better than mixed batches",
        IRPAN,
        "2_two_datasets",
        from_to(("mixed-shared", "running"), ("turn-domain", "running")),
    ),
    Claim(
        "A model left in training mode fails at inference on small batches",
        IRPAN,
        "7_diagnosis",
        harm("training mode: batches of 4"),
    ),
    Claim(
        "Batches that do not represent the data do harm: not to shuffle is especially bad",
        IRPAN,
        "7_diagnosis",
        harm("sorted batches: 100 % of one class"),
    ),
    Claim(
        "Early in training the running average is far worse than precise statistics",
        WU + ", section 3",
        "4_estimating_statistics",
        precise_is_better("early", 1, "Batches of 128"),
    ),
    Claim(
        "So it is with large batches, 8 192 there",
        WU + ", section 3",
        "4_estimating_statistics",
        precise_is_better("large", 1, "Batches of 2 048 after 2 epochs"),
    ),
    Claim(
        "At the end of a long training the two agree (23.7 and 23.5 % error)",
        WU + ", table 2",
        "4_estimating_statistics",
        same_column(32, "running 0.9", "100"),
    ),
    Claim(
        "To estimate in batches of 2 costs 5.3 points of error",
        WU + ", table 2",
        "4_estimating_statistics",
        costs(32, "2", reported=5.3),
    ),
    Claim(
        "2.4 points where training, too, had the smallest groups: 2 there, 4 here",
        WU + ", table 2",
        "4_estimating_statistics",
        costs(4, "2", reported=2.4),
    ),
    Claim(
        "From batches of 10 on next to nothing is lost",
        WU + ", table 2",
        "4_estimating_statistics",
        same_column(32, "all", "10"),
    ),
    Claim(
        "Small batches underestimate the variance of deep layers",
        WU + ", section 3.2",
        "4_estimating_statistics",
        variance,
    ),
    Claim(
        "Exact statistics gain nothing over precise ones of large batches",
        WU + ", appendix A.3",
        "4_estimating_statistics",
        same_column(32, "100", "exact, 2"),
    ),
    Claim("A thousand samples are enough", WU + ", section 3", "4_estimating_statistics", thousand_images),
    Claim(
        "Estimate with the augmentation of training: 23.4 instead of 23.8 % error",
        WU + ", table 4",
        "4_estimating_statistics",
        augmented,
    ),
    Claim(
        "New statistics mend a change of contrast: 40.8 → 33.1 % error",
        WU + ", table 4",
        "5_changed_data",
        corrupted("contrast", reported=7.7),
    ),
    Claim("Noise: 64.4 → 52.5 % error", WU + ", table 4", "5_changed_data", corrupted("noise", reported=11.9)),
    Claim("JPEG: 40.4 → 36.7 % error", WU + ", table 4", "5_changed_data", corrupted("jpeg", reported=3.7)),
    Claim(
        "Statistics of each domain, in training and at the test, are as good as shared ones in both",
        WU + ", table 5",
        "2_two_datasets",
        as_good(("mixed-shared", "shared"), ("mixed-domain", "domain")),
    ),
    Claim(
        "Shared in training and of each at the test is a catastrophe: 2.1 instead of 39.1 AP",
        WU + ", table 5",
        "2_two_datasets",
        from_to(("mixed-shared", "domain"), ("mixed-shared", "shared"), reported=37),
    ),
    Claim(
        "Of each in training and shared at the test is bad, too",
        WU + ", table 5",
        "2_two_datasets",
        from_to(("mixed-domain", "shared"), ("mixed-domain", "domain")),
    ),
    Claim(
        "A scale and a bias for each domain add nothing",
        WU + ", table 5",
        "2_two_datasets",
        same_cell(("mixed-domain", "domain"), ("mixed-domain-affine", "domain")),
    ),
    Claim(
        "The same with batches of one dataset in turn",
        "this library",
        "2_two_datasets",
        same_cell(("turn-domain", "domain"), ("turn-domain-affine", "domain")),
    ),
    Claim(
        "Where data come from several sites, statistics of each serve the predictions for a new one",
        SITES,
        "6_four_hospitals",
        own_statistics("AUC", 1),
    ),
    Claim("The same of the probabilities", SITES, "6_four_hospitals", own_statistics("Brier score", -1)),
    Claim(
        "With groups of four, renormalization wins back about half of what is lost",
        IOFFE + ", section 4.2",
        "3_batch_renormalization",
        won_back("random groups", 4, share=0.5),
    ),
    Claim(
        "With batches that are no random sample, nearly all of it",
        IOFFE + ", section 4.3",
        "3_batch_renormalization",
        won_back("groups of two classes", 4, share=1),
    ),
    Claim(
        "The same where each group holds one class",
        "this library",
        "3_batch_renormalization",
        won_back("groups of one class", 4, share=1),
    ),
    Claim(
        "Renormalization is better where two examples are all that a step sees",
        IOFFE + ", section 4.2, of groups of four",
        "3_batch_renormalization",
        dense("random", 2),
    ),
    Claim(
        "With large random batches nothing is lost by it",
        IOFFE + ", section 4.1",
        "3_batch_renormalization",
        nothing_lost,
    ),
    Claim(
        "`diagnose` names the trap that a network is in, and none where there is none",
        "this library",
        "7_diagnosis",
        hits,
    ),
)
