import java.net.InetAddress;
import java.net.Socket;
import java.security.SecureRandom;
import java.security.cert.X509Certificate;
import java.util.List;
import javax.net.ssl.SNIHostName;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManager;
import javax.net.ssl.X509TrustManager;

/** A client with Java's own TLS: Client NAME ADDRESS PORT. Its sockets are IPv6 ones, also to an IPv4 address. */
class Client {
	static final X509TrustManager BELIEVING = new X509TrustManager() {
		public void checkClientTrusted(X509Certificate[] chain, String type) {}

		public void checkServerTrusted(X509Certificate[] chain, String type) {}

		public X509Certificate[] getAcceptedIssuers() {
			return new X509Certificate[0];
		}
	};

	public static void main(String[] args) throws Exception {
		SSLContext context = SSLContext.getInstance("TLS");
		context.init(null, new TrustManager[] {BELIEVING}, new SecureRandom());
		// With its name, lest it be asked for.
		InetAddress address = InetAddress.getByAddress(args[0], InetAddress.getByName(args[1]).getAddress());
		try (Socket plain = new Socket(address, Integer.parseInt(args[2]));
				SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket(plain, args[0], plain.getPort(), true)) {
			SSLParameters parameters = socket.getSSLParameters();
			parameters.setServerNames(List.of(new SNIHostName(args[0])));
			parameters.setApplicationProtocols(new String[] {"http/1.1"});
			socket.setSSLParameters(parameters);
			socket.getOutputStream().write("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".getBytes("US-ASCII"));
			System.out.write(socket.getInputStream().readAllBytes());
			System.out.flush();
		}
	}
}
