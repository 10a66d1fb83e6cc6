"""What lmms-eval finds through the entry point group `lmms_eval.models`: its own program knows `--model pmod`."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="pmod", simple_class_path="pmod_cli.evaluation.adapter.PmodModel")
