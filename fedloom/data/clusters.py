"""Group examples into categories by their words, for corpora without categories.

Texts become TF-IDF vectors (hashed words). A truncated SVD reduces them to their leading directions (latent semantic
analysis, Deerwester et al. 1990), and k-means groups them; scikit-learn does all three. The groups replace the
category,
so any splitter can use them. The same seed gives the same groups on the same versions. FedNLP splits by clusters of
embeddings (Lin et al., arXiv 2104.08815); its sentence encoder would have to be downloaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from fedloom.common.errors import UserError
from fedloom.common.randomness import numpy_generator
from fedloom.data.corpus import Corpus

#: Number of leading directions.
DIRECTIONS = 32


#: Number of buckets for hashed words.
WORDS = 1 << 16


def clustered(corpus: Corpus, count: int, seed: int) -> Corpus:
    """Return the corpus with `count` groups as categories, named ``cluster-1`` … from the largest to the smallest.

    Raises:
        UserError: scikit-learn is missing, or there are fewer different texts than groups.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.preprocessing import normalize
    except ModuleNotFoundError:
        raise UserError('split.clusters needs scikit-learn: pip install "fedloom[clusters]"') from None
    texts = [f"{e.instruction}\n{e.input}" for e in corpus.examples]
    if len(set(texts)) < count:
        raise UserError(f"split.clusters={count}, but there are only {len(set(texts))} different texts: lower it")
    state = int(numpy_generator(seed, "split").integers(2**31))
    words: Any = HashingVectorizer(n_features=WORDS, alternate_sign=False, stop_words="english", norm=None).transform(
        texts
    )
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(words)
    directions = min(DIRECTIONS, len(texts) - 1, WORDS - 1)
    vectors = (
        weighted.toarray() if directions < 2 else TruncatedSVD(directions, random_state=state).fit_transform(weighted)
    )
    labels = KMeans(count, n_init=4, random_state=state).fit_predict(normalize(vectors))
    return replace(corpus, examples=_name_clusters(corpus, np.asarray(labels)))


def _name_clusters(corpus: Corpus, labels: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Any, ...]:
    order = [label for label, _ in sorted(Counter(labels.tolist()).items(), key=lambda item: (-item[1], item[0]))]
    width = len(str(len(order)))
    names = {label: f"cluster-{k:0{width}d}" for k, label in enumerate(order, start=1)}
    return tuple(replace(e, category=names[label]) for e, label in zip(corpus.examples, labels.tolist(), strict=True))
