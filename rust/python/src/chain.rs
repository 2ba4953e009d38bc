//! `Chain`.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyTuple};

use crate::bytes::with_bytes;
use crate::errors::{chain_error, GuestError};

#[pyclass(module = "pyvirtio._core")]
pub struct Chain {
    pub inner: pyvirtio_core::Chain,
}

#[pymethods]
impl Chain {
    #[getter]
    fn head(&self) -> u16 {
        self.inner.head()
    }

    #[getter]
    fn readable(&self) -> PyResult<usize> {
        self.inner.check_live().map_err(chain_error)?;
        Ok(self.inner.readable_left())
    }

    #[getter]
    fn writable(&self) -> PyResult<usize> {
        self.inner.check_live().map_err(chain_error)?;
        Ok(self.inner.writable_left())
    }

    #[pyo3(signature = (length = None))]
    fn read<'py>(&mut self, py: Python<'py>, length: Option<usize>) -> PyResult<Bound<'py, PyBytes>> {
        let length = length.map_or(self.inner.readable_left(), |length| length.min(self.inner.readable_left()));
        PyBytes::new_with(py, length, |out| self.inner.read(out).map(drop).map_err(chain_error))
    }

    fn unpack<'py>(&mut self, py: Python<'py>, format: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyTuple>> {
        static CALCSIZE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        static UNPACK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let size: usize = CALCSIZE.import(py, "struct", "calcsize")?.call1((format,))?.extract()?;
        let left = self.readable()?;
        if size > left {
            return Err(GuestError::new_err(format!("{size} bytes wanted, the chain has {left} left")));
        }
        let bytes = self.read(py, Some(size))?;
        Ok(UNPACK.import(py, "struct", "unpack")?.call1((format, bytes))?.cast_into()?)
    }

    fn write(&mut self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |data| self.inner.write(data))?.map_err(chain_error)
    }

    fn complete(&mut self) -> PyResult<()> {
        self.inner.complete().map_err(chain_error)
    }
}
