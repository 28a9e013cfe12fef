"""What a policy was asked and what it answered, on disk and back (docs/recording.md).

In: observations, replies and the noise they started from. Out: records to replay, and files for the rerun viewer.
"""

from __future__ import annotations

from pi0_engine.recording.files import Recording
from pi0_engine.recording.recorder import Recorder, RecordingPolicy, describe_policy

__all__ = ["Recorder", "Recording", "RecordingPolicy", "describe_policy"]
