"""Folders of files: CAM files, image-level labels, images and label maps; refining, checking and
evaluating whole folders; pages.

    cams             CAM files of the known baselines, read and written
    pickles          the restricted reader for `.npy` files that hold pickles
    labels           image-level labels, from the formats that pipelines use
    images           image ids, images, and label maps as PNGs
    proposals        masks without a class: run lengths, label maps, folders of PNGs
    cam_folder       CAM files together with their images and labels
    refine_folder    a folder of CAM files -> refined CAM files and pseudo labels
    evaluate_folder  pseudo labels or CAM files against ground truth
    report           one HTML page of what a refinement changed
    check_folder     will the loss help with these CAM files?
    check_page       one HTML page of that
    pages            what the pages share

Needs `pip install 'semples-plugin[cli]'`. Importing this package imports nothing of it.
"""
