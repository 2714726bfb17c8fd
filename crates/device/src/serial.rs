//! The queue between a byte-stream device (a UART, a console port) and whoever holds the other end.

/// The outside of a device that carries bytes.
///
/// The device holds bounded buffers: it takes only what it has room for, and its [`crate::Notify`] fires when it has
/// output, or room for input again.
pub trait Endpoint: Send {
    /// Offers bytes to the guest on `port`; answers how many were taken.
    fn offer(&mut self, port: u32, bytes: &[u8]) -> usize;
    /// Appends what the guest has sent on `port` since the last call to `into`, at most `max` bytes.
    fn take(&mut self, port: u32, into: &mut Vec<u8>, max: usize);
    /// Tells the guest whether somebody holds the other end of `port`.
    fn connect(&mut self, _port: u32, _connected: bool) {}
}
