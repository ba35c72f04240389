"""The embedded demo: espeak-ng speaks small corpora in published layouts; a teacher is taught from its time line.

corpora.py     what `python -m pipelines demo` runs: all corpora to a folder, or the proof that they stand there
librispeech.py speech_commands.py voxceleb1.py      one published layout each: its jobs, its lists
recording.py booth.py                               what a job is; jobs in fresh processes
espeak.py voices.py room.py sentences.py lexicon.py the synthesiser, who speaks, where, what, and how it is spelled
lessons.py teach.py probe.py                        what the teacher is taught from, its training, its card
teacher/                                            the teacher
"""
