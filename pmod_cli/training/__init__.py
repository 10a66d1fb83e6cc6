"""Fine-tuning: settings, data set, trainer and the run that ties them; and what trained the bundled model."""
