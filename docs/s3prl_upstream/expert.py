"""A Retort student as an upstream of s3prl, the toolkit that SUPERB's published scores come from.

    cp docs/s3prl_upstream/expert.py S3PRL/s3prl/upstream/example/expert.py
    cd S3PRL/s3prl && python3 run_downstream.py -m train -n NAME -u customized_upstream -k STUDENT_FOLDER -d TASK

s3prl keeps the name `customized_upstream` for this one file and imports it from there. It needs torch and transformers
of the versions that Retort needs, nothing of Retort and nothing of s3prl: the student's code lies in its folder.

Shapes: B utterances, S samples of the longest, T frames of the longest, D features.
"""

# What s3prl calls: https://github.com/s3prl/s3prl/blob/main/s3prl/upstream/example/expert.py

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel


class UpstreamExpert(nn.Module):
    """Waveforms to all hidden states of the student, layer 0 first.

    Arguments:
        ckpt: the student's folder, s3prl's option -k. The code in it is run.
        model_config, others: what s3prl passes to every upstream; not needed.
    """

    def __init__(self, ckpt: str, model_config: str | None = None, **others: object) -> None:
        super().__init__()
        model, found = AutoModel.from_pretrained(ckpt, trust_remote_code=True, output_loading_info=True)
        if found["missing_keys"]:  # transformers would leave them random
            raise ValueError(
                f"{ckpt}: opened as {type(model).__name__}, whose {min(found['missing_keys'])} is not there"
            )
        self.model = model.float()  # transformers 5 opens a model in the precision it was saved in

    def get_downsample_rates(self, key: str) -> int:
        """Samples from one frame to the next, the teacher's (320 for most); the same for every key."""
        return math.prod(self.model.config.conv_stride)

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor]]:
        """Waveforms at 16 kHz, float32 (samples,), -1 to 1 -> hidden_states, each (B, T, D).

        As stage one: an utterance's own frames, the first that its own samples fill, are what it gets alone, whatever
        its batch. With the usual stem these are (samples - 400) // 320 + 1.
        """
        if self.model.config.do_normalize:  # as transformers' Wav2Vec2FeatureExtractor
            wavs = [(wav - wav.mean()) / torch.sqrt(wav.var(correction=0) + 1e-7) for wav in wavs]
        num_samples_B = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        waveforms_BS = pad_sequence(wavs, batch_first=True)
        mask_BS = torch.arange(waveforms_BS.shape[1], device=waveforms_BS.device) < num_samples_B[:, None]
        output = self.model(waveforms_BS, attention_mask=mask_BS.long(), output_hidden_states=True)
        return {"hidden_states": list(output.hidden_states)}
