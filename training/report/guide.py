"""What the numbers of a report mean: how each looks in a healthy run, and in a sick one.

Reference: Caron et al. 2021, section 5.3 and appendix D, https://arxiv.org/abs/2104.14294
"""

_ROWS = (
    (
        "Loss",
        "Falls from near ln K and then slowly; it may rise while the teacher's temperature rises.",
        "Stays at ln K: the answer is uniform. Falls to nothing: one prototype takes all. The loss alone "
        "proves nothing: look at its two parts.",
    ),
    (
        "Teacher entropy",
        "Well below ln K and well above 0.",
        "ln K: centring won, lower the teacher's temperature. 0: sharpening won, raise it or lower the "
        "centre's momentum.",
    ),
    (
        "KL",
        "Above 0: teacher and student still disagree on other crops of an image: there is something to "
        "learn.",
        "0 from some step on: every image gets the same answer; this is collapse.",
    ),
    (
        "k-NN accuracy",
        "Rises above that of the untrained network (step 0); slowly in the end.",
        "Below the untrained network's for long: collapse, or augmentation that takes away what tells "
        "classes apart.",
    ),
    (
        "RankMe and feature spread",
        "RankMe (effective dimensions) is far above 1, spread near 1 / sqrt(D).",
        "RankMe towards 1, spread towards 0: all embeddings are the same. A slow fall late in training is "
        "usual.",
    ),
    (
        "Prototypes in use",
        "A good share, and steady.",
        "Towards 1/K: one prototype takes all. With few images a small share means that K is too large.",
    ),
    (
        "Distance of teacher and student",
        "Small and steady; shrinks as the momentum goes to 1.",
        "0: nothing is learnt. Growing without end: the learning rate is too high.",
    ),
    (
        "Gradient norm",
        "Steady, with spikes now and then, which clipping cuts.",
        "Gaps (NaN, skipped steps) or growth: lower the learning rate, or use float32.",
    ),
    (
        "Gradient norm by part",
        "Stem, blocks, head and last layer within a few powers of ten; the last layer also shows one while "
        "it stands still.",
        "One part far above the others spikes before the run does: the stem in ViTs (lower the learning "
        "rate, or warm up longer), the last layer (let it stand still for longer).",
    ),
    (
        "Waiting for data",
        "Below a tenth.",
        "Above it the GPU stands still: more workers, or the cache.",
    ),
)

GUIDE = (
    '<div class="wide"><table><tr><th>number</th><th>healthy</th><th>sick</th></tr>'
    + "".join(f"<tr><td><b>{name}</b></td><td>{well}</td><td>{ill}</td></tr>" for name, well, ill in _ROWS)
    + "</table></div>"
)
