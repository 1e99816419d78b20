//! The Python class `RustBPE`. Python's lock is released while counting, merging and encoding.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::{
    count_pieces, train, Bpe, Error, Pair, PieceCounts, Splitter, MAX_VOCAB_SIZE, PATTERN,
};

/// Texts are counted in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 23;
/// How long Ctrl-C may have to wait.
const SIGNALS_EVERY: Duration = Duration::from_millis(100);
const MAX_THREADS: usize = 1024;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-pair encoder: `RustBPE(vocab_size).train(texts)`, then `encode` and `decode`.
#[pyclass(frozen, module = "nanochat.rustbpe")]
struct RustBPE {
    target: usize,
    bpe: Mutex<Arc<Bpe>>,
}

impl RustBPE {
    fn current(&self) -> Arc<Bpe> {
        Arc::clone(&self.bpe.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl RustBPE {
    /// `vocab_size`: how many ids training may use, the 256 bytes included.
    /// `pattern`: the regular expression that cuts text into pieces; nanochat's without it.
    #[new]
    #[pyo3(signature = (vocab_size, pattern=None))]
    fn new(vocab_size: &Bound<'_, PyAny>, pattern: Option<&str>) -> PyResult<Self> {
        let target = natural(vocab_size, "vocab_size")?;
        if !(256..=MAX_VOCAB_SIZE).contains(&target) {
            return Err(Error::VocabSize(target).into());
        }
        let splitter = Splitter::new(pattern.unwrap_or(PATTERN))?;
        let bpe = Mutex::new(Arc::new(Bpe::new(splitter, Vec::new())?));
        Ok(Self { target, bpe })
    }

    /// The encoder that these merges describe; merge `k` makes id `256 + k`.
    #[staticmethod]
    #[pyo3(signature = (merges, pattern=None))]
    fn from_merges(
        py: Python<'_>,
        merges: &Bound<'_, PyAny>,
        pattern: Option<&str>,
    ) -> PyResult<Self> {
        let merges = merges
            .try_iter()?
            .map(|pair| {
                let (left, right): (Bound<'_, PyAny>, Bound<'_, PyAny>) = pair?.extract()?;
                Ok((id(&left)?, id(&right)?))
            })
            .collect::<PyResult<Vec<Pair>>>()?;
        let splitter = Splitter::new(pattern.unwrap_or(PATTERN))?;
        let bpe = py.detach(|| Bpe::new(splitter, merges))?;
        Ok(Self {
            target: bpe.vocab_size(),
            bpe: Mutex::new(Arc::new(bpe)),
        })
    }

    /// Learns merges from an iterable of texts, which is read once and never held whole.
    #[pyo3(signature = (texts, verbose=false))]
    fn train(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, verbose: bool) -> PyResult<()> {
        let splitter = self.current().splitter().clone();
        let mut counts = PieceCounts::default();
        let mut texts = texts.try_iter()?;
        loop {
            let mut batch: Vec<PyBackedStr> = Vec::new();
            let mut bytes = 0;
            while bytes < BATCH_BYTES {
                let Some(text) = texts.next() else { break };
                let text: PyBackedStr = text?.extract()?;
                bytes += text.len();
                batch.push(text);
            }
            if batch.is_empty() {
                break;
            }
            py.check_signals()?;
            for (piece, count) in py.detach(|| count_pieces(&splitter, &batch)) {
                *counts.entry(piece).or_insert(0) += count;
            }
        }
        if verbose {
            say(py, format!("{} distinct pieces", counts.len()))?;
        }

        let started = Instant::now();
        let mut asked = started;
        let mut said = started;
        let mut raised = None;
        let learned = py.detach(|| {
            train(&counts, self.target, &mut |done| {
                if asked.elapsed() < SIGNALS_EVERY {
                    return ControlFlow::Continue(());
                }
                asked = Instant::now();
                let result = Python::attach(|py| {
                    py.check_signals()?;
                    if verbose && said.elapsed() > Duration::from_secs(5) {
                        said = Instant::now();
                        say(py, format!("{done} of {} merges", self.target - 256))?;
                    }
                    Ok(())
                });
                match result {
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
        let bpe = py.detach(|| Bpe::new(splitter, learned?))?;
        if verbose {
            let seconds = started.elapsed().as_secs_f64();
            say(
                py,
                format!("{} merges in {seconds:.1} s", bpe.merges().len()),
            )?;
        }
        *self.bpe.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(bpe);
        Ok(())
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> Vec<u32> {
        let bpe = self.current();
        py.detach(|| bpe.encode(&text))
    }

    /// The ids of many texts, encoded on `num_threads` threads (all cores without it).
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_batch(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        num_threads: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Vec<u32>>> {
        let bpe = self.current();
        let Some(num_threads) = num_threads else {
            return Ok(py.detach(|| bpe.encode_batch(&texts)));
        };
        let threads = natural(num_threads, "num_threads")?;
        if !(1..=MAX_THREADS).contains(&threads) {
            let message = format!("num_threads must be from 1 to {MAX_THREADS}, not {threads}");
            return Err(PyValueError::new_err(message));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| PyValueError::new_err(format!("{threads} threads do not start: {e}")))?;
        Ok(py.detach(|| pool.install(|| bpe.encode_batch(&texts))))
    }

    /// The text of the ids; bytes that are not UTF-8 become U+FFFD.
    fn decode(&self, ids: &Bound<'_, PyAny>) -> PyResult<String> {
        Ok(self.current().decode(&all_ids(ids)?)?)
    }

    /// The bytes of the ids.
    fn decode_bytes(&self, ids: &Bound<'_, PyAny>) -> PyResult<std::borrow::Cow<'static, [u8]>> {
        Ok(self.current().decode_bytes(&all_ids(ids)?)?.into())
    }

    /// The merges in the order in which they were learned.
    fn merges(&self) -> Vec<Pair> {
        self.current().merges().to_vec()
    }

    /// How many ids there are now: 256 before training.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.current().vocab_size()
    }

    /// The regular expression that cuts text into pieces.
    #[getter]
    fn pattern(&self) -> String {
        self.current().splitter().pattern().to_owned()
    }

    fn __repr__(&self) -> String {
        format!("RustBPE(vocab_size={})", self.vocab_size())
    }
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

fn natural(value: &Bound<'_, PyAny>, name: &str) -> PyResult<usize> {
    in_range(value, name)
}

fn id(value: &Bound<'_, PyAny>) -> PyResult<u32> {
    in_range(value, "id")
}

fn all_ids(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    ids.try_iter()?.map(|value| id(&value?)).collect()
}

fn say(py: Python<'_>, message: String) -> PyResult<()> {
    py.import("builtins")?
        .call_method1("print", (format!("rustbpe: {message}"),))?;
    Ok(())
}

#[pymodule]
fn rustbpe(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("PATTERN", PATTERN)?;
    m.add_class::<RustBPE>()
}
