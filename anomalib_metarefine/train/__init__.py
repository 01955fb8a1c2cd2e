"""From a folder of images to a verified model: curate, train, calibrate, export, verify; resumable."""
