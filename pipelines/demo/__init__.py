"""Synthetic speech corpora of the demo, in the layouts of the published data sets that the readers open.

corpora.py                                      the command `python -m pipelines demo`: all corpora to one folder
recording.py process_pool.py                    recording jobs, and fresh processes that run them
espeak.py voices.py room_acoustics.py           the synthesiser, its voices, rooms and microphones
sentences.py lexicon.py                         the grammar of the sentences, and pronunciations of its words
librispeech.py speech_commands.py voxceleb1.py fluent.py iemocap.py snips.py librimix.py quesst14.py
                                                one published layout each: its jobs and its lists

Every file of this folder takes part in the bytes of the corpora, so the folder is one dependency of one DVC stage.
"""
