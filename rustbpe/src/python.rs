//! The Python class `RustBPE`. Python's lock is released while counting, merging, encoding and decoding.

use std::ops::ControlFlow;
use std::sync::mpsc::{sync_channel, SyncSender, TrySendError};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyTypeError, PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyList, PyString};

use crate::{files, train, Counter, Counts, Encoder, Error, Ids, Options, Pair};
use crate::{lock, Splitter, Vocab, GPT2_PATTERN, GPT4_PATTERN, MAX_VOCAB_SIZE, PATTERN};

/// Texts go to the counting threads in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 20;
/// How often Ctrl-C is looked for and progress is told.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const MAX_THREADS: usize = 1024;
/// So many numbers become Python's integers at a time.
const LIST_CHUNK: usize = 1 << 20;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-pair encoder. `RustBPE(vocab_size)` knows single bytes until `train` teaches it merges;
/// `from_texts`, `from_merges`, `from_ranks` and `from_json` make one that is ready.
#[pyclass(module = "nanochat.rustbpe")]
struct RustBPE {
    encoder: Encoder,
    /// The vocabulary size that `train` aims at.
    wanted: usize,
}

impl RustBPE {
    fn new(splitter: Splitter, vocab: Vocab) -> Self {
        Self {
            wanted: vocab.size(),
            encoder: Encoder::new(splitter, vocab),
        }
    }

    fn vocab(&self) -> &Vocab {
        self.encoder.vocab()
    }
}

/// A vocabulary size that a tokenizer can have.
fn size(vocab_size: &Bound<'_, PyAny>) -> PyResult<usize> {
    let vocab_size: usize = in_range(vocab_size, "vocab_size")?;
    if !(256..=MAX_VOCAB_SIZE).contains(&vocab_size) {
        return Err(Error::VocabSize(vocab_size).into());
    }
    Ok(vocab_size)
}

/// Learns `vocab_size - 256` merges from texts, or as many as there are.
fn learn(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    vocab_size: usize,
    splitter: &Splitter,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<Pair>> {
    let mut watch = Watch::new(progress);
    let counts = count(py, texts, splitter, threads, &mut watch)?;
    let mut raised = None;
    let learned = py.detach(|| {
        train(counts, vocab_size, &mut |done| {
            if !watch.is_due() {
                return ControlFlow::Continue(());
            }
            let look = |py: Python<'_>| watch.look(py, "merges", done, vocab_size - 256);
            match Python::attach(look) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    raised = Some(error);
                    ControlFlow::Break(())
                }
            }
        })
    });
    if let Some(error) = raised {
        return Err(error);
    }
    let merges = learned?;
    watch.look(py, "merges", merges.len(), merges.len())?;
    Ok(merges)
}

#[pymethods]
impl RustBPE {
    /// Makes an encoder of single bytes, for `train` to learn `vocab_size - 256` merges.
    #[new]
    #[pyo3(signature = (vocab_size, pattern=PATTERN))]
    fn untrained(py: Python<'_>, vocab_size: &Bound<'_, PyAny>, pattern: &str) -> PyResult<Self> {
        let wanted = size(vocab_size)?;
        let vocab = Vocab::from_merges(&[], &[] as &[String])?;
        let encoder = Encoder::new(splitter(py, pattern)?, vocab);
        Ok(Self { encoder, wanted })
    }

    /// Learns merges from an iterable of texts, which is read once and never held whole.
    ///
    /// The vocabulary may come out smaller than requested where no pair occurs twice any more.
    /// `verbose` prints its size and the time taken.
    #[pyo3(signature = (texts, verbose=false))]
    fn train(slf: &Bound<'_, Self>, texts: &Bound<'_, PyAny>, verbose: bool) -> PyResult<()> {
        let (py, started) = (slf.py(), Instant::now());
        let (splitter, wanted) = {
            let this = slf.borrow();
            (this.encoder.splitter().clone(), this.wanted)
        };
        let merges = learn(py, texts, wanted, &splitter, threads(None)?, None)?;
        let vocab = py.detach(|| Vocab::from_merges(&merges, &[] as &[String]))?;
        if verbose {
            let seconds = started.elapsed().as_secs_f64();
            let line = format!(
                "Learned {} merges, vocabulary {}, in {seconds:.1} s.",
                merges.len(),
                vocab.size()
            );
            py.import("builtins")?.call_method1("print", (line,))?;
        }
        slf.try_borrow_mut()?.encoder = Encoder::new(splitter, vocab);
        Ok(())
    }

    /// The encoder whose merges are learned from an iterable of texts, which is read once and never held whole.
    ///
    /// `vocab_size` counts the 256 bytes and the merges; it may come out smaller where no pair occurs twice
    /// any more. `progress(phase, done, total)` is called about ten times a second: "bytes read", of which
    /// the total is not known (0), then "merges".
    #[staticmethod]
    #[pyo3(signature = (texts, vocab_size, pattern=PATTERN, special_tokens=vec![], num_threads=None, progress=None))]
    fn from_texts(
        py: Python<'_>,
        texts: &Bound<'_, PyAny>,
        vocab_size: &Bound<'_, PyAny>,
        pattern: &str,
        special_tokens: Vec<String>,
        num_threads: Option<&Bound<'_, PyAny>>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let wanted = size(vocab_size)?;
        let threads = threads(num_threads)?;
        let splitter = splitter(py, pattern)?;
        let merges = learn(py, texts, wanted, &splitter, threads, progress)?;
        let vocab = py.detach(|| Vocab::from_merges(&merges, &special_tokens))?;
        Ok(Self::new(splitter, vocab))
    }

    /// The encoder of these merges: byte `b` is id `b`, and merge `k` makes id `256 + k`.
    #[staticmethod]
    #[pyo3(signature = (merges, pattern=PATTERN, special_tokens=vec![]))]
    fn from_merges(
        py: Python<'_>,
        merges: &Bound<'_, PyAny>,
        pattern: &str,
        special_tokens: Vec<String>,
    ) -> PyResult<Self> {
        let pair = |pair: PyResult<Bound<'_, PyAny>>| -> PyResult<Pair> {
            let (left, right): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair?.extract()?;
            Ok((in_range(&left, "id")?, in_range(&right, "id")?))
        };
        let merges: Vec<Pair> = watched(merges.try_iter()?.map(pair)).collect::<PyResult<_>>()?;
        let splitter = splitter(py, pattern)?;
        let vocab = py.detach(|| Vocab::from_merges(&merges, &special_tokens))?;
        Ok(Self::new(splitter, vocab))
    }

    /// The encoder of a tiktoken rank file's content; special tokens come behind its ranks.
    #[staticmethod]
    #[pyo3(signature = (data, pattern, special_tokens=vec![]))]
    fn from_ranks(
        py: Python<'_>,
        data: &[u8],
        pattern: &str,
        special_tokens: Vec<String>,
    ) -> PyResult<Self> {
        let splitter = splitter(py, pattern)?;
        let vocab = py.detach(|| files::from_ranks(data, &special_tokens))?;
        Ok(Self::new(splitter, vocab))
    }

    /// The encoder of a `tokenizer.json`'s content, which must be as `to_json` writes it.
    #[staticmethod]
    fn from_json(py: Python<'_>, data: &[u8]) -> PyResult<Self> {
        let (vocab, splitter) = py.detach(|| files::from_json(data))?;
        warn_if_slow(py, &splitter)?;
        Ok(Self::new(splitter, vocab))
    }

    /// The content of `tokenizer.json`, in the format of Hugging Face's tokenizers.
    fn to_json(&self, py: Python<'_>) -> String {
        py.detach(|| files::to_json(self.vocab(), self.encoder.splitter().pattern()))
    }

    /// The content of a tiktoken rank file: without the pattern, and without special tokens.
    fn to_ranks<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let ranks = py.detach(|| files::to_ranks(self.vocab()));
        PyBytes::new(py, ranks.as_bytes())
    }

    /// The ids of a text; what looks like a special token in it is text like any other.
    fn encode<'py>(&self, py: Python<'py>, text: PyBackedStr) -> PyResult<Bound<'py, PyList>> {
        if text.len() < BATCH_BYTES {
            return PyList::new(py, py.detach(|| self.encoder.encode(&text)));
        }
        let mut watch = Watch::new(None);
        let ids = py.detach(|| self.encoder.encode_or_stop(&text, || watch.look_if_due()))?;
        let list = PyList::new(py, &ids[..ids.len().min(LIST_CHUNK)])?;
        for chunk in ids[list.len()..].chunks(LIST_CHUNK) {
            py.check_signals()?;
            list.call_method1("extend", (PyList::new(py, chunk)?,))?;
        }
        Ok(list)
    }

    /// The ids of many texts on `num_threads` threads (all cores without it), each behind the id `prepend`.
    ///
    /// Three values: the ids end to end, as the bytes of native integers; where each text begins and the
    /// last one ends, as the bytes of int64; and how many bytes an id has (2 or 4). With `cache=False`
    /// every piece is merged anew.
    #[pyo3(signature = (texts, num_threads=None, prepend=None, cache=true))]
    #[allow(clippy::type_complexity)]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<&Bound<'py, PyAny>>,
        prepend: Option<&Bound<'py, PyAny>>,
        cache: bool,
    ) -> PyResult<(Bound<'py, PyByteArray>, Bound<'py, PyByteArray>, usize)> {
        let threads = threads(num_threads)?;
        let prepend = prepend.map(|id| in_range(id, "id")).transpose()?;
        let options = Options {
            threads,
            prepend,
            cache,
        };
        let texts = iterate(texts)?.enumerate();
        let texts = texts.map(|(i, text)| string(i, &text?));
        let detached = |work: &mut (dyn FnMut() + Send)| {
            py.detach(work);
            py.check_signals()
        };
        let batch = self.encoder.encode_batch(texts, options, detached)?;
        let width = self.encoder.id_bytes();
        let n: usize = batch.lengths.iter().sum();
        let ids = PyByteArray::new_with(py, n * width, |mut bytes| {
            for chunk in batch.chunks() {
                let length = match chunk {
                    Ids::U16(ids) => store(bytes, ids, |id| id.to_ne_bytes()),
                    Ids::U32(ids) => store(bytes, ids, |id| id.to_ne_bytes()),
                };
                bytes = &mut bytes[length..];
            }
            Ok(())
        })?;
        let mut offsets = vec![0i64];
        let mut end = 0;
        offsets.extend(batch.lengths.iter().map(|n| {
            end += *n as i64;
            end
        }));
        let offsets = PyByteArray::new_with(py, offsets.len() * 8, |bytes| {
            store(bytes, &offsets, |offset| offset.to_ne_bytes());
            Ok(())
        })?;
        Ok((ids, offsets, width))
    }

    /// The bytes of the ids: a list, a numpy array, or anything else that yields integers.
    fn decode_bytes<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = self.bytes_of(py, ids)?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// The text of the ids; bytes that are not UTF-8 become U+FFFD.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyString>> {
        let bytes = self.bytes_of(py, ids)?;
        // checking first is much faster where the text is whole
        Ok(match std::str::from_utf8(&bytes) {
            Ok(text) => PyString::new(py, text),
            Err(_) => PyString::new(py, &String::from_utf8_lossy(&bytes)),
        })
    }

    /// The texts of many rows of ids.
    fn decode_batch<'py>(
        &self,
        py: Python<'py>,
        rows: &Bound<'py, PyAny>,
    ) -> PyResult<Vec<Bound<'py, PyString>>> {
        watched(rows.try_iter()?.map(|ids| self.decode(py, &ids?))).collect()
    }

    /// The bytes of every id in order, special tokens included.
    fn tokens<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        let ids = 0..self.vocab().size() as u32;
        ids.map(|id| PyBytes::new(py, self.vocab().token(id)))
            .collect()
    }

    /// For every id of more than one byte the two ids that it is merged from, in order; None where no merges reach it.
    fn merges(&self) -> Vec<Option<Pair>> {
        let merges = self.vocab().merges().iter().enumerate();
        let merged = merges.filter(|&(id, _)| self.vocab().token(id as u32).len() > 1);
        merged.map(|(_, &pair)| pair).collect()
    }

    /// The ids of the 256 bytes.
    fn byte_ids(&self) -> Vec<u32> {
        self.vocab().byte_ids().to_vec()
    }

    /// How many ids there are, special tokens included.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocab().size()
    }

    /// The names of the special tokens, whose ids are the last.
    #[getter]
    fn special_tokens(&self) -> Vec<String> {
        self.vocab().special_tokens().collect()
    }

    /// The regular expression that cuts text into pieces.
    #[getter]
    fn pattern(&self) -> &str {
        self.encoder.splitter().pattern()
    }

    fn __repr__(&self) -> String {
        format!("RustBPE(vocab_size={})", self.vocab_size())
    }
}

impl RustBPE {
    fn bytes_of(&self, py: Python<'_>, ids: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
        let ids = all_ids(ids)?;
        Ok(py.detach(|| self.vocab().decode(&ids))?)
    }
}

/// Counts the pieces of the texts on threads, while this one goes on reading texts.
fn count(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    splitter: &Splitter,
    threads: usize,
    watch: &mut Watch,
) -> PyResult<Counts> {
    let counts = Counts::new();
    let (sender, receiver) = sync_channel::<TextBatch>(2 * threads);
    let receiver = Mutex::new(receiver);
    let worker = || {
        let splitter = splitter.clone();
        let mut counter = Counter::new(&counts);
        let receive = || lock(&receiver).recv(); // the lock ends here, not with the loop's body
        while let Ok(batch) = receive() {
            let mut start = 0;
            for end in batch.ends {
                counter.count(&splitter, &batch.text[start..end]);
                start = end;
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let fed = feed(py, texts, splitter, sender, watch);
        let join = || workers.into_iter().all(|worker| worker.join().is_ok());
        match (fed, py.detach(join)) {
            (fed, true) => fed,
            (_, false) => Err(PyRuntimeError::new_err(
                "a thread that counts pieces failed",
            )),
        }
    })?;
    Ok(counts)
}

/// Texts end to end, and where each ends.
#[derive(Default)]
struct TextBatch {
    text: String,
    ends: Vec<usize>,
}

fn feed(
    py: Python<'_>,
    texts: &Bound<'_, PyAny>,
    splitter: &Splitter,
    sender: SyncSender<TextBatch>,
    watch: &mut Watch,
) -> PyResult<()> {
    let mut batch = TextBatch::default();
    let mut read = 0;
    let mut send = |batch: TextBatch| {
        read += batch.text.len();
        let mut waiting = batch;
        loop {
            if watch.is_due() {
                watch.look(py, "bytes read", read, 0)?;
            }
            match sender.try_send(waiting) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(batch)) => waiting = batch,
                Err(TrySendError::Disconnected(_)) => {
                    return Err(PyRuntimeError::new_err("no thread counts any more"))
                }
            }
            py.detach(|| thread::sleep(Duration::from_millis(1)));
        }
    };
    for (i, text) in iterate(texts)?.enumerate() {
        let text = string(i, &text?)?;
        let mut start = 0;
        while start < text.len() {
            let mut end = text.len();
            if end - start > 2 * BATCH_BYTES {
                end = splitter.safe_cut(&text, start + BATCH_BYTES);
            }
            batch.text.push_str(&text[start..end]);
            batch.ends.push(batch.text.len());
            start = end;
            if batch.text.len() >= BATCH_BYTES {
                send(std::mem::take(&mut batch))?;
            }
        }
    }
    send(batch)
}

/// Looks for Ctrl-C and tells progress, but not too often.
struct Watch {
    progress: Option<Py<PyAny>>,
    looked: Instant,
}

impl Watch {
    fn new(progress: Option<Py<PyAny>>) -> Self {
        Self {
            progress,
            looked: Instant::now(),
        }
    }

    /// Whether it is time to look again.
    fn is_due(&self) -> bool {
        self.looked.elapsed() >= LOOK_EVERY
    }

    /// Looks for Ctrl-C if it is time to, from any thread.
    fn look_if_due(&mut self) -> PyResult<()> {
        if !self.is_due() {
            return Ok(());
        }
        self.looked = Instant::now();
        Python::attach(|py| py.check_signals())
    }

    fn look(&mut self, py: Python<'_>, phase: &str, done: usize, total: usize) -> PyResult<()> {
        self.looked = Instant::now();
        py.check_signals()?;
        match &self.progress {
            Some(progress) => progress.call1(py, (phase, done, total)).map(drop),
            None => Ok(()),
        }
    }
}

/// The splitter for a pattern, with a warning where that is a regex engine.
fn splitter(py: Python<'_>, pattern: &str) -> PyResult<Splitter> {
    let splitter = Splitter::new(pattern)?;
    warn_if_slow(py, &splitter)?;
    Ok(splitter)
}

fn warn_if_slow(py: Python<'_>, splitter: &Splitter) -> PyResult<()> {
    if splitter.is_scanner() {
        return Ok(());
    }
    let message = c"this split pattern has no scanner, so it goes through a regex engine, several times slower: PATTERN, GPT2_PATTERN and GPT4_PATTERN have one";
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), message, 1)
}

fn iterate<'py>(
    texts: &Bound<'py, PyAny>,
) -> PyResult<impl Iterator<Item = PyResult<Bound<'py, PyAny>>>> {
    if texts.is_instance_of::<PyString>() {
        let message =
            "the texts must be an iterable of strings, not one string: put it into a list";
        return Err(PyTypeError::new_err(message));
    }
    Ok(watched(texts.try_iter()?))
}

/// The same items. Ctrl-C is an error among them, even where no Python code makes them.
fn watched<T>(items: impl Iterator<Item = PyResult<T>>) -> impl Iterator<Item = PyResult<T>> {
    let mut watch = Watch::new(None);
    items.enumerate().map(move |(i, item)| {
        if i % 1024 == 1023 {
            watch.look_if_due()?;
        }
        item
    })
}

fn string(i: usize, text: &Bound<'_, PyAny>) -> PyResult<PyBackedStr> {
    let Ok(string) = text.cast::<PyString>() else {
        let kind = text.get_type().name()?;
        return Err(PyTypeError::new_err(format!(
            "text {i} must be a string, not {kind}"
        )));
    };
    string.clone().try_into()
}

/// A Python integer that an unsigned type cannot hold is a `ValueError` like any other bad value.
fn in_range<'py, T>(value: &Bound<'py, PyAny>, name: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    value.extract::<T>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            PyValueError::new_err(format!("{name} {value} is out of range"))
        } else {
            error
        }
    })
}

fn threads(num_threads: Option<&Bound<'_, PyAny>>) -> PyResult<usize> {
    let Some(num_threads) = num_threads else {
        return Ok(thread::available_parallelism().map_or(1, usize::from));
    };
    let threads = in_range(num_threads, "num_threads")?;
    if !(1..=MAX_THREADS).contains(&threads) {
        let message = format!("num_threads must be from 1 to {MAX_THREADS}, not {threads}");
        return Err(PyValueError::new_err(message));
    }
    Ok(threads)
}

/// The ids in a list, in a buffer of integers such as a numpy array, or in any other iterable.
fn all_ids(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    if let Ok(list) = ids.cast::<PyList>() {
        let ids = list.iter().map(|id| in_range(&id, "id"));
        return watched(ids).collect();
    }
    let buffered = None
        .or_else(|| from_buffer::<u16>(ids))
        .or_else(|| from_buffer::<u32>(ids))
        .or_else(|| from_buffer::<i64>(ids))
        .or_else(|| from_buffer::<i32>(ids));
    buffered.unwrap_or_else(|| {
        let ids = ids.try_iter()?.map(|id| in_range(&id?, "id"));
        watched(ids).collect()
    })
}

/// The ids in a buffer of this type of integers; None if it is no such buffer.
fn from_buffer<T>(ids: &Bound<'_, PyAny>) -> Option<PyResult<Vec<u32>>>
where
    T: Element + std::fmt::Display,
    u32: TryFrom<T>,
{
    let buffer = PyBuffer::<T>::get(ids).ok()?;
    Some(buffer.to_vec(ids.py()).and_then(|values| {
        let id = |value: T| {
            u32::try_from(value)
                .map_err(|_| PyValueError::new_err(format!("id {value} is out of range")))
        };
        values.into_iter().map(id).collect()
    }))
}

/// Writes numbers into the front of some bytes, and says how many bytes they take.
fn store<T: Copy, const N: usize>(
    bytes: &mut [u8],
    numbers: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) -> usize {
    for (target, &number) in bytes.chunks_exact_mut(N).zip(numbers) {
        target.copy_from_slice(&to_bytes(number));
    }
    numbers.len() * N
}

#[pymodule]
fn rustbpe(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("PATTERN", PATTERN)?;
    m.add("GPT2_PATTERN", GPT2_PATTERN)?;
    m.add("GPT4_PATTERN", GPT4_PATTERN)?;
    m.add_class::<RustBPE>()
}
