//! A web server that serves files, and can misbehave in the ways that servers do.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a path answers.
#[derive(Clone)]
pub enum Answer {
    /// The file.
    Body(Vec<u8>),
    /// Announces the file, but sends only so many bytes.
    Truncated(Vec<u8>, usize),
    /// Sends for ever.
    Endless,
    /// Sends nothing, for ever.
    Hang,
    /// An error.
    Status(u16),
}

pub struct Mirror {
    port: u16,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    stopped: Arc<AtomicBool>,
}

impl Mirror {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers = Arc::new(Mutex::new(HashMap::new()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (table, stop) = (Arc::clone(&answers), Arc::clone(&stopped));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let table = Arc::clone(&table);
                std::thread::spawn(move || serve(&stream, &table));
            }
        });
        Mirror { port, answers, stopped }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn set(&self, path: &str, answer: Answer) {
        self.answers.lock().unwrap().insert(path.to_owned(), answer);
    }

    /// From now on nobody listens.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn serve(stream: &TcpStream, table: &Mutex<HashMap<String, Answer>>) -> Option<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    let path = request.split(' ').nth(1)?.to_owned();
    while !lines.next()?.ok()?.is_empty() {}
    let answer = table.lock().unwrap().get(&path).cloned().unwrap_or(Answer::Status(404));
    let mut stream = stream;
    let head = |status: u16, length: usize| {
        format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    match answer {
        Answer::Body(bytes) => {
            stream.write_all(head(200, bytes.len()).as_bytes()).ok()?;
            stream.write_all(&bytes).ok()
        }
        Answer::Truncated(bytes, length) => {
            stream.write_all(head(200, bytes.len()).as_bytes()).ok()?;
            stream.write_all(&bytes[..length]).ok()
        }
        Answer::Endless => {
            stream.write_all(b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n").ok()?;
            let block = vec![b'x'; 1 << 16];
            while stream.write_all(&block).is_ok() {}
            Some(())
        }
        Answer::Hang => {
            std::thread::sleep(Duration::from_secs(30));
            Some(())
        }
        Answer::Status(status) => stream.write_all(head(status, 0).as_bytes()).ok(),
    }
}
