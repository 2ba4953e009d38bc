//! `NetPlane`, and the network that is written in Python.

use std::fs::File;
use std::os::fd::RawFd;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyBytes, PyDict};
use pyvirtio_core::chain::Segment;
use pyvirtio_core::planes::net::{
    self, copy_out, total, Capture, Filter, FrameFd, Header, Inbox, Mac, Port, Reason, Refused, StreamFd,
};
use pyvirtio_core::sync::duplicate;
use pyvirtio_core::{Handler, VirtQueue};

use crate::bytes::with_bytes;
use crate::errors::os_error;
use crate::iothread::IoThread;
use crate::logging;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct NetPlane {
    plane: Arc<net::NetPlane>,
    /// Where injected frames wait, unless the network is one of file descriptors.
    inbox: Option<Arc<Inbox>>,
    python: bool,
}

impl NetPlane {
    pub fn handler(&self) -> Arc<dyn Handler> {
        if self.python {
            Arc::new(Attached(self.plane.clone()))
        } else {
            self.plane.clone()
        }
    }
}

#[pymethods]
impl NetPlane {
    #[new]
    #[pyo3(signature = (fds = Vec::new(), *, framing = "tap", vnet_header = false, send = None, queue_pairs = 1,
                        pcap = None))]
    fn new(
        fds: Vec<RawFd>,
        framing: &str,
        vnet_header: bool,
        send: Option<Py<PyAny>>,
        queue_pairs: usize,
        pcap: Option<RawFd>,
    ) -> PyResult<Self> {
        let capture = pcap.map(capture).transpose()?;
        if !fds.is_empty() {
            let ports = fds.iter().map(|fd| native(*fd, framing, vnet_header)).collect::<PyResult<_>>()?;
            return Ok(Self { plane: Arc::new(net::NetPlane::new(ports, capture)), inbox: None, python: false });
        }
        let inbox = Arc::new(Inbox::new().map_err(os_error)?);
        let python = send.is_some();
        let port: Arc<dyn Port> = match send {
            Some(send) => Arc::new(PythonPort { send, inbox: inbox.clone() }),
            None => inbox.clone(),
        };
        let ports = vec![port; queue_pairs.max(1)];
        Ok(Self { plane: Arc::new(net::NetPlane::new(ports, capture)), inbox: Some(inbox), python })
    }

    fn open(&self, features: u64, loops: Vec<PyRef<'_, IoThread>>) {
        let threads: Vec<_> = loops.iter().map(|one| one.0.clone()).collect();
        self.plane.open(features, &threads);
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.plane.close());
    }

    fn disconnect(&self) {
        self.plane.disconnect();
    }

    fn set_features(&self, features: u64) {
        self.plane.set_features(features);
    }

    #[pyo3(signature = (*, promiscuous = true, all_multicast = false, all_unicast = false, no_multicast = false,
                        no_unicast = false, no_broadcast = false, macs = Vec::new(), vlans = None))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn set_filter(
        &self,
        promiscuous: bool,
        all_multicast: bool,
        all_unicast: bool,
        no_multicast: bool,
        no_unicast: bool,
        no_broadcast: bool,
        macs: Vec<Mac>,
        vlans: Option<Vec<u8>>,
    ) {
        self.plane.set_filter(Filter {
            promiscuous,
            all_multicast,
            all_unicast,
            no_multicast,
            no_unicast,
            no_broadcast,
            macs,
            vlans,
        });
    }

    fn set_link(&self, up: bool) {
        self.plane.set_link(up);
    }

    fn set_queue_pairs(&self, py: Python<'_>, count: usize) {
        py.detach(|| self.plane.set_active(count));
    }

    fn inject(&self, frames: &Bound<'_, PyAny>) -> PyResult<usize> {
        let inbox =
            self.inbox.as_ref().ok_or_else(|| PyValueError::new_err("its frames come from file descriptors"))?;
        let mut all = Vec::new();
        for frame in frames.try_iter()? {
            all.push(with_bytes(&frame?, |frame| Box::<[u8]>::from(frame))?);
        }
        let (count, up) = (all.len(), self.plane.is_open());
        let queued = if up { inbox.push(all) } else { 0 };
        self.plane.dropped(Reason::Overflow, count - queued);
        Ok(queued)
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.plane.counters().into_py_dict(py)
    }
}

fn native(fd: RawFd, framing: &str, vnet_header: bool) -> PyResult<Arc<dyn Port>> {
    match (framing, vnet_header) {
        ("tap" | "datagram", header) => FrameFd::new(fd, header).map(|port| Arc::new(port) as _).map_err(os_error),
        ("stream", false) => StreamFd::new(fd).map(|port| Arc::new(port) as _).map_err(os_error),
        ("stream", true) => Err(PyValueError::new_err("a stream carries no headers")),
        (other, _) => Err(PyValueError::new_err(format!("framing {other:?}: allowed are tap, datagram and stream"))),
    }
}

fn capture(fd: RawFd) -> PyResult<Capture> {
    duplicate(fd).and_then(|fd| Capture::new(File::from(fd))).map_err(os_error)
}

/// Attaches once for all frames that are sent in a pass, not for each.
struct Attached(Arc<net::NetPlane>);

impl Handler for Attached {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        if vq.index() % 2 == 0 {
            self.0.handle(vq);
        } else {
            Python::attach(|_| self.0.handle(vq));
        }
    }
}

/// The `send` of a `NetBackend`.
struct PythonPort {
    send: Py<PyAny>,
    inbox: Arc<Inbox>,
}

impl Port for PythonPort {
    fn send(&self, _header: &Header, frame: &mut [Segment]) -> Result<(), Refused> {
        let frame = &frame[1..];
        Python::attach(|py| {
            let bytes = PyBytes::new_with(py, total(frame), |out| {
                copy_out(frame, out);
                Ok(())
            });
            bytes.and_then(|bytes| self.send.bind(py).call1((bytes,))).map(drop).map_err(|error| refused(py, &error))
        })
    }

    fn receive(&self, into: &[Segment]) -> Result<(Header, usize), Refused> {
        self.inbox.receive(into)
    }

    fn discard(&self) -> usize {
        self.inbox.discard()
    }

    fn fd(&self) -> RawFd {
        self.inbox.fd()
    }
}

/// The host's fault drops the frame; anything else is the backend's own.
fn refused(py: Python<'_>, error: &PyErr) -> Refused {
    if error.is_instance_of::<pyo3::exceptions::PyOSError>(py) {
        return Refused::Dropped(Reason::Error);
    }
    logging::exception(py, "exception in a network backend", error);
    let name = error.get_type(py).qualname().map_or_else(|_| "an exception".into(), |name| name.to_string());
    Refused::Broken(format!("the backend raised {name}: {}", error.value(py)))
}
