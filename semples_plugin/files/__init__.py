"""Folders of files: CAM files, image-level labels, images and label maps; refining and evaluating whole folders; the report.

    cams             CAM files of the known baselines, read and written
    pickles          the restricted reader for `.npy` files that hold pickles
    labels           image-level labels, from the formats that pipelines use
    images           image ids, images, and label maps as PNGs
    refine_folder    a folder of CAM files -> refined CAM files and pseudo labels
    evaluate_folder  pseudo labels or CAM files against ground truth
    report           one HTML page of what a refinement changed

Needs `pip install 'semples-plugin[cli]'`. Importing this package imports nothing of it.
"""
