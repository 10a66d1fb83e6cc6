"""Fine-tuning: settings, data set, trainer and the run that ties them."""
