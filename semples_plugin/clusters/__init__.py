"""Category clusters (PCC, arXiv 2412.13823; CPC, arXiv 2508.17009): classes that share features, as a prior for training.

    clusters = CategoryClusters.bundled("voc")        # or .load(path, classes), or one of the two functions below
    refiner = PromptRefiner(classes, clusters=clusters)  # background prompts are repelled from a whole cluster

    branch = ClusterBranch(clusters, model)           # cluster tokens, patch classifier, patch contrast; model: a ViT
    optimizer.add_param_group({"params": branch.parameters()})
    with branch.insert(model):
        loss = host_loss(model(img), labels) + branch(labels)

`clusters_from_language_model` asks a language model, `clusters_from_text_features` groups CLIP's text features; both need
`pip install 'semples-plugin[clusters]'`. Importing this package imports none of that.
"""

from .branch import ClusterBranch
from .categories import CategoryClusters
from .language_model import clusters_from_language_model
from .text_features import clusters_from_text_features

__all__ = ["CategoryClusters", "ClusterBranch", "clusters_from_language_model", "clusters_from_text_features"]
